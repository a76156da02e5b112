"use strict";
// The slider over steps: every picture shows the newest drawing up to that step.
(() => {
  const { steps, uris } = JSON.parse(document.getElementById("drawn").textContent);
  const slider = document.getElementById("step"), said = document.getElementById("shown");
  const cells = [...document.querySelectorAll("img[data-cell]")];
  function show() {
    const at = steps[slider.value];
    said.textContent = "step " + at.toLocaleString("en");
    slider.setAttribute("aria-valuetext", said.textContent);
    for (const cell of cells) {
      const there = Object.keys(uris[cell.dataset.cell]).map(Number).filter(step => step <= at);
      const step = there.length ? Math.max(...there) : null, note = cell.parentElement.querySelector(".when");
      cell.classList.toggle("none", step === null);
      if (step !== null && cell.dataset.step !== String(step)) cell.src = uris[cell.dataset.cell][step];
      cell.dataset.step = step === null ? "" : step;
      note.textContent = step === null ? "not drawn yet" : "step " + step.toLocaleString("en");
    }
  }
  if (slider) {
    slider.addEventListener("input", show);
    for (const [name, by] of [["back", -1], ["on", 1]]) document.getElementById(name).addEventListener("click", () => {
      slider.value = +slider.value + by;
      show();
    });
    document.getElementById("player").hidden = false;
    show();
  }
  document.documentElement.dataset.ready += " pictures";
})();
