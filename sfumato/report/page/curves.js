"use strict";
// Curves on canvases that share one axis of steps. Drag to zoom, double click for all of it.
(() => {
  const told = JSON.parse(document.getElementById("told").textContent);
  const root = document.documentElement, all = [];
  const every = told.charts.flatMap(chart => chart.series.flatMap(line => [line.x[0], line.x[line.x.length - 1]]));
  const whole = [Math.min(...every), Math.max(...every)];
  if (whole[0] === whole[1]) { whole[0] -= 1; whole[1] += 1; }
  let view = [...whole], smooth = 0.6, ink = {};
  const LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 26;

  // The mean with weights that fall exponentially to both sides: no lag, and nothing before the first point.
  function smoothed(values, share) {
    const span = Math.pow(Math.max(1, values.length / 5), share), keep = 1 - 1 / span;
    if (span < 1.5) return null;
    const n = values.length, sum = new Float64Array(n), weight = new Float64Array(n);
    for (const back of [false, true]) {
      let total = 0, mass = 0;
      for (let i = 0; i < n; i++) {
        const k = back ? n - 1 - i : i;
        total = keep * total + values[k]; mass = keep * mass + 1;
        sum[k] += total; weight[k] += mass;
      }
    }
    return Array.from(sum, (total, k) => (total - values[k]) / (weight[k] - 1));
  }

  function within(line, [from, to]) {
    let a = 0, b = line.x.length;
    while (a < b) { const m = (a + b) >> 1; if (line.x[m] < from) a = m + 1; else b = m; }
    let c = a, d = line.x.length;
    while (c < d) { const m = (c + d) >> 1; if (line.x[m] <= to) c = m + 1; else d = m; }
    return [Math.max(0, a - 1), Math.min(line.x.length, c + 1), a, c];  // one beyond each end, and without
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most, power = Math.pow(10, Math.floor(Math.log10(rough)));
    const gap = [1, 2, 5, 10].map(f => f * power).find(g => g >= rough * 0.999), found = [];
    for (let k = Math.ceil(low / gap - 1e-9); k <= high / gap + 1e-9; k++) found.push(k * gap);
    return [found, gap];
  }

  function decades(low, high) {
    const wide = Math.log10(high / low), parts = wide > 3 ? [1] : wide > 1 ? [1, 3] : [1, 2, 3, 5, 7];
    const skip = Math.max(1, Math.ceil(wide / 6)), found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++)
      if (p % skip === 0) for (const f of parts) {
        const v = f * Math.pow(10, p);
        if (v >= low * 0.999 && v <= high * 1.001) found.push(v);
      }
    return found.length > 1 ? found : ticks(low, high, 4)[0].filter(v => v > 0);
  }

  const label = (v, gap) => {
    if (v === 0) return "0";
    const size = Math.abs(v);
    if (size >= 1e7 || size < 1e-4 || (gap && gap < 1e-4)) {
      const digits = gap ? Math.max(0, Math.floor(Math.log10(size) + 1e-9) - Math.floor(Math.log10(gap) + 1e-9)) : 1;
      return v.toExponential(Math.min(digits, 6)).replace(/(\.\d*?)0+e/, "$1e").replace(".e", "e").replace("e+", "e");
    }
    const places = gap ? Math.max(0, -Math.floor(Math.log10(gap) + 1e-9)) : 0;
    return gap ? v.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places })
      : v.toLocaleString("en", { maximumSignificantDigits: 4 });
  };
  const exact = v => Math.abs(v) >= 1e-3 || v === 0 ? v.toLocaleString("en", { maximumSignificantDigits: 5 })
    : v.toExponential(3).replace(/\.?0+e/, "e");
  const count = v => (Math.round(v) || 0).toLocaleString("en");

  function colours() {
    const style = getComputedStyle(root), get = name => style.getPropertyValue("--" + name).trim();
    ink = { faint: get("faint"), line: get("line"), axis: get("axis"), mark: get("mark") };
    for (const kind of "cr") for (let n = 0; n < 8; n++) ink[kind + n] = get(kind + n);
  }

  function bounds(chart, lines) {
    let low = Infinity, high = -Infinity;
    const take = v => { if (chart.log && v <= 0) return; if (v < low) low = v; if (v > high) high = v; };
    for (const line of lines) {
      const [, , a, c] = within(line, view);
      if (line.soft) for (let k = a; k < c; k++) take(line.soft[k]);
      const raw = line.y.slice(a, c).filter(v => !chart.log || v > 0).sort((p, q) => p - q);
      const cut = chart.spec.noisy && raw.length >= 50 ? Math.floor(raw.length / 100) : 0;
      if (raw.length) { take(raw[cut]); take(raw[raw.length - 1 - cut]); }
      if (!chart.spec.noisy) for (const edge of view) {
        const k = line.x.findIndex(step => step > edge), share = (edge - line.x[k - 1]) / (line.x[k] - line.x[k - 1]);
        if (k > 0) take(line.y[k - 1] + share * (line.y[k] - line.y[k - 1]));
      }
    }
    if (low > high) [low, high] = chart.log ? [0.1, 1] : [0, 1];
    if (chart.log) { const room = Math.pow(high / low, 0.06) || 1; return low === high ? [low / 2, high * 2] : [low / room, high * room]; }
    if (chart.spec.zero) { low = Math.min(0, low); high = Math.max(0, high); }
    const room = (high - low) * 0.07 || Math.abs(high) * 0.1 || 1;
    return [low === 0 || (low > 0 && low < room) ? 0 : low - room, high === 0 ? 0 : high + room];
  }

  function draw(chart) {
    const canvas = chart.canvas, wide = canvas.clientWidth, tall = canvas.clientHeight;
    if (!wide) return;
    const fine = Math.max(1, window.devicePixelRatio || 1), pen = canvas.getContext("2d");
    canvas.width = Math.round(wide * fine); canvas.height = Math.round(tall * fine);
    pen.setTransform(fine, 0, 0, fine, 0, 0);
    pen.font = "11px system-ui, sans-serif"; pen.lineJoin = "round";
    const lines = chart.lines.filter(line => !line.off), [low, high] = bounds(chart, lines);
    const box = chart.box = { l: LEFT, r: wide - RIGHT, t: TOP, b: tall - BOTTOM };
    const X = chart.X = step => box.l + (step - view[0]) / (view[1] - view[0]) * (box.r - box.l);
    const f = chart.log ? Math.log : v => v, base = f(low), size = f(high) - base;
    const Y = v => box.b - (f(v) - base) / size * (box.b - box.t);
    const [marks, gap] = chart.log ? [decades(low, high), 0] : ticks(low, high, Math.max(3, tall / 36));
    pen.textAlign = "right"; pen.textBaseline = "middle"; pen.lineWidth = 1;
    for (const v of marks) {
      const y = Math.round(Y(v)) + 0.5;
      pen.strokeStyle = v === 0 ? ink.axis : ink.line; pen.beginPath(); pen.moveTo(box.l, y); pen.lineTo(box.r, y); pen.stroke();
      pen.fillStyle = ink.faint; pen.fillText(label(v, gap), box.l - 8, y);
    }
    pen.textAlign = "center"; pen.textBaseline = "top";
    for (const s of ticks(view[0], view[1], Math.max(2, wide / 110))[0]) if (Number.isInteger(s) && s >= 0) {
      const x = Math.round(X(s)) + 0.5;
      pen.strokeStyle = ink.axis; pen.beginPath(); pen.moveTo(x, box.b); pen.lineTo(x, box.b + 4); pen.stroke();
      pen.textAlign = x > box.r - 20 ? "right" : "center";
      pen.fillText(count(s), x > box.r - 20 ? box.r + RIGHT - 2 : x, box.b + 8);
    }
    pen.strokeStyle = ink.axis; pen.beginPath(); pen.moveTo(box.l, box.b + 0.5); pen.lineTo(box.r, box.b + 0.5); pen.stroke();
    pen.save(); pen.beginPath(); pen.rect(box.l, box.t - 6, box.r - box.l, box.b - box.t + 7); pen.clip();
    for (const mark of told.marks) if (mark.kind === "restart") {
      const x = Math.round(X(mark.step)) + 0.5;
      pen.strokeStyle = ink.mark; pen.setLineDash([2, 4]); pen.beginPath(); pen.moveTo(x, box.t); pen.lineTo(x, box.b); pen.stroke(); pen.setLineDash([]);
    }
    for (const line of lines) band(pen, line, chart, X, Y);
    for (const line of lines) if (line.soft && chart.spec.noisy) trace(pen, line, line.y, 1, told.runs > 1 ? 0.16 : 0.3, chart, X, Y);
    for (const line of lines) trace(pen, line, line.soft || line.y, 1.75, 1, chart, X, Y);
    for (const line of lines) beyond(pen, line, chart, X, low, high, box);
    pen.restore();
    for (const part of [chart.cross, chart.drag]) { part.style.top = canvas.offsetTop + box.t - 6 + "px"; part.style.height = box.b - box.t + 6 + "px"; }
    chart.figure.dataset.from = view[0]; chart.figure.dataset.to = view[1];
    chart.figure.dataset.low = low; chart.figure.dataset.high = high;
  }

  function band(pen, line, chart, X, Y) {
    if (!line.least || told.runs > 1) return;
    const [a, c] = within(line, view);
    pen.fillStyle = ink[line.tint]; pen.globalAlpha = 0.1; pen.beginPath();
    for (let k = a; k < c; k++) pen.lineTo(X(line.x[k]), Y(line.most[k]));
    for (let k = c - 1; k >= a; k--) pen.lineTo(X(line.x[k]), Y(chart.log ? Math.max(line.least[k], 1e-30) : line.least[k]));
    pen.fill(); pen.globalAlpha = 1;
  }

  function trace(pen, line, values, wide, alpha, chart, X, Y) {
    const [a, c, from, to] = within(line, view);
    pen.strokeStyle = pen.fillStyle = ink[line.tint]; pen.lineWidth = wide; pen.globalAlpha = alpha;
    pen.setLineDash(line.dash ? [[6, 3], [2, 3]][(line.dash - 1) % 2] : []); pen.beginPath();
    let on = false;
    for (let k = a; k < c; k++) {
      if (chart.log && values[k] <= 0) { on = false; continue; }
      if (on) pen.lineTo(X(line.x[k]), Y(values[k])); else pen.moveTo(X(line.x[k]), Y(values[k]));
      on = true;
    }
    pen.stroke(); pen.setLineDash([]);
    if (wide > 1 && to - from <= (line.soft ? 12 : 40)) for (let k = from; k < to; k++) if (!chart.log || values[k] > 0) {
      pen.beginPath(); pen.arc(X(line.x[k]), Y(values[k]), 2.6, 0, 7); pen.fill();
    }
    pen.globalAlpha = 1;
  }

  // What lies outside the field leaves a small arrow at its edge.
  function beyond(pen, line, chart, X, low, high, box) {
    const [, , a, c] = within(line, view);
    pen.fillStyle = ink[line.tint]; pen.globalAlpha = 0.75;
    for (let k = a; k < c; k++) if (line.y[k] > high || (line.y[k] < low && !(chart.log && line.y[k] <= 0))) {
      const x = X(line.x[k]), up = line.y[k] > high, y = up ? box.t - 5 : box.b + 1, d = up ? 5 : -5;
      pen.beginPath(); pen.moveTo(x, y); pen.lineTo(x - 3.5, y + d); pen.lineTo(x + 3.5, y + d); pen.fill();
    }
    pen.globalAlpha = 1;
  }

  function redraw() { all.forEach(draw); hide(); }
  function show(from, to) {
    const least = Math.max(2, (whole[1] - whole[0]) / 5000), middle = (from + to) / 2;
    if (to - from < least) [from, to] = [middle - least / 2, middle + least / 2];
    view = [Math.max(whole[0], from), Math.min(whole[1], to)];
    const zoomed = view[0] > whole[0] || view[1] < whole[1];
    document.getElementById("range").textContent = zoomed ? `steps ${count(view[0])} to ${count(view[1])}` : "";
    document.getElementById("whole").disabled = !zoomed;
    redraw();
  }
  const zoom = (factor, at) => show(at - (at - view[0]) * factor, at + (view[1] - at) * factor);

  function hide() { for (const chart of all) { chart.cross.hidden = true; chart.tip.hidden = true; } }
  function point(chart, x) {
    const step = view[0] + (x - chart.box.l) / (chart.box.r - chart.box.l) * (view[1] - view[0]);
    let near = null;
    for (const line of chart.lines) if (!line.off) {
      const [, , a, c] = within(line, view);
      for (const k of closest(line, step, a, c)) if (near === null || Math.abs(line.x[k] - step) < Math.abs(near - step)) near = line.x[k];
    }
    if (near !== null) tell(chart, near);
  }
  function closest(line, step, a, c) {
    if (a >= c) return [];
    let lo = a, hi = c - 1;
    while (lo < hi) { const m = (lo + hi) >> 1; if (line.x[m] < step) lo = m + 1; else hi = m; }
    return [lo, Math.max(a, lo - 1)].sort((p, q) => Math.abs(line.x[p] - step) - Math.abs(line.x[q] - step)).slice(0, 1);
  }
  function tell(chart, step) {
    chart.at = step;
    for (const other of all) if (other.X) {
      other.cross.hidden = false; other.cross.style.left = other.canvas.offsetLeft + other.X(step) + "px"; other.tip.hidden = other !== chart;
    }
    const rows = chart.lines.filter(line => !line.off).map(line => {
      const k = closest(line, step, 0, line.x.length)[0], far = Math.abs(line.x[k] - step);
      if (k === undefined || far > (view[1] - view[0]) / 20) return null;
      const row = document.createElement("div"), key = document.createElement("i"), name = document.createElement("span"), value = document.createElement("b");
      key.style.background = `var(--${line.tint})`; name.textContent = line.name || chart.spec.title;
      value.textContent = exact(line.y[k]) + (line.soft ? `  (smoothed ${exact(line.soft[k])})` : "") + (far ? `  at ${count(line.x[k])}` : "");
      row.append(key, name, value);
      return row;
    });
    const head = document.createElement("p"), w = chart.spec.width;
    const near = told.marks.filter(m => Math.abs(m.step - step) <= Math.max(w, (view[1] - view[0]) / 200)).map(m => m.text);
    head.textContent = (w > 1 ? `step ${count(step)}, ${count(w)} steps a point` : `step ${count(step)}`) + (near.length ? ": " + [...new Set(near)].join(", ") : "");
    chart.tip.replaceChildren(head, ...rows.filter(Boolean));
    const x = chart.X(step), right = x > chart.canvas.clientWidth / 2;
    chart.tip.style.left = right ? "auto" : chart.canvas.offsetLeft + x + 12 + "px";
    chart.tip.style.right = right ? chart.figure.clientWidth - chart.canvas.offsetLeft - x + 12 + "px" : "auto";
  }

  function listen(chart) {
    const { canvas, figure, drag } = chart;
    let from = null;
    const place = event => Math.min(Math.max(event.clientX - canvas.getBoundingClientRect().left, chart.box.l), chart.box.r);
    const step = x => view[0] + (x - chart.box.l) / (chart.box.r - chart.box.l) * (view[1] - view[0]);
    canvas.addEventListener("pointerdown", event => { if (event.button === 0) { from = place(event); canvas.setPointerCapture(event.pointerId); } });
    canvas.addEventListener("pointermove", event => {
      const x = place(event);
      if (from === null || Math.abs(x - from) < 5) return point(chart, x);
      chart.tip.hidden = true; drag.hidden = false;
      drag.style.left = canvas.offsetLeft + Math.min(x, from) + "px"; drag.style.width = Math.abs(x - from) + "px";
    });
    const end = event => {
      const x = place(event), begun = from;
      from = null; drag.hidden = true;
      if (event.type === "pointerup" && begun !== null && Math.abs(x - begun) >= 5) show(step(Math.min(x, begun)), step(Math.max(x, begun)));
    };
    canvas.addEventListener("pointerup", end);
    canvas.addEventListener("pointercancel", end);
    canvas.addEventListener("pointerleave", () => { if (from === null) hide(); });
    canvas.addEventListener("dblclick", () => show(...whole));
    canvas.addEventListener("blur", hide);
    canvas.addEventListener("keydown", event => {
      const xs = (chart.lines.find(line => !line.off) || chart.lines[0]).x, [, , a, c] = within({ x: xs }, view);
      const here = chart.at !== undefined && chart.at >= view[0] && chart.at <= view[1] ? chart.at : xs[c - 1];
      const k = Math.min(c - 1, Math.max(a, closest({ x: xs }, here, a, c)[0] + (event.key === "ArrowLeft" ? -1 : 1) * (event.shiftKey ? 10 : 1)));
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") tell(chart, xs[k]);
      else if (event.key === "+" || event.key === "=") zoom(0.5, here);
      else if (event.key === "-") zoom(2, here);
      else if (event.key === "0" || event.key === "Escape") show(...whole);
      else return;
      event.preventDefault();
    });
    const log = figure.querySelector(".log");
    log.addEventListener("click", () => { chart.log = !chart.log; log.setAttribute("aria-pressed", chart.log); draw(chart); });
    figure.querySelectorAll(".key").forEach((key, n) => key.addEventListener("click", () => {
      chart.lines[n].off = !chart.lines[n].off; key.setAttribute("aria-pressed", !chart.lines[n].off); draw(chart);
    }));
  }

  function soften() {
    for (const chart of all) for (const line of chart.lines) line.soft = chart.spec.noisy && line.y.length > 4 ? smoothed(line.y, smooth) : null;
  }
  for (const figure of document.querySelectorAll("figure.chart")) {
    const spec = told.charts[figure.dataset.chart], part = name => figure.querySelector(name);
    const chart = { figure, spec, lines: spec.series, log: false, canvas: part("canvas"), cross: part(".cross"), tip: part(".tip"), drag: part(".drag") };
    part(".log").hidden = !spec.series.some(line => line.y.some(v => v > 0));
    all.push(chart); listen(chart);
  }
  if (all.length) {
    const slider = document.getElementById("smooth");
    slider.addEventListener("input", () => { smooth = slider.value / 100; soften(); redraw(); });
    smooth = slider.value / 100;
    document.getElementById("whole").addEventListener("click", () => show(...whole));
    document.getElementById("in").addEventListener("click", () => zoom(0.5, (view[0] + view[1]) / 2));
    document.getElementById("out").addEventListener("click", () => zoom(2, (view[0] + view[1]) / 2));
    const anew = () => { colours(); redraw(); };
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", anew);
    addEventListener("beforeprint", () => { root.classList.add("paper"); anew(); });
    addEventListener("afterprint", () => { root.classList.remove("paper"); anew(); });
    new ResizeObserver(redraw).observe(document.querySelector("main"));
    soften(); colours(); show(...whole);
  }
  root.dataset.ready = "curves";
})();
