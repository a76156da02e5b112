"""The trained module in DeepSpeed's hands: forward, backward, step, and what may be read from it."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import wraps
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.engine import blocks, ema, gradients, offload, optimizer, profiles, reader, shards, swap
from sfumato.engine.ds_config import autocast, ds_config
from sfumato.engine.ranks import Ranks
from sfumato.engine.scale import LossScale
from sfumato.engine.size import STATES
from sfumato.engine.weights import WeightFiles
from sfumato.models.loading import DTYPES


class Engine:
    """One module, one optimizer, sharded as `[engine]` says; it is called like the module.

    `step` counts applied optimizer steps, from zero. One backward and one step per micro-batch: DeepSpeed
    counts the micro-batches, and the weights move on the last one of a global batch.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        build: Callable[[], nn.Module],
        weights: WeightFiles,
        settle: Callable[[Any], None] | None = None,
    ) -> None:
        """Build the module on all ranks together and fill it with weights.

        build: makes the module; every trained parameter's shape is final, its numbers are not used.
        settle: may change what is frozen once it has its numbers; only below stage 3, which has cut it up.
        Raises UserError if the weights are not the module's.
        """
        self.config, self.ranks = config, ranks
        self.accumulation = config.accumulation(ranks.world)
        self.autocast = autocast(config)
        self.dtype = torch.float32 if self.autocast else DTYPES[config.engine.precision]
        """The format of the module's weights."""
        self.step_count = 0
        self.began = 0
        """The applied step at which the optimizer's states began."""
        self.position = 0
        """Global batches that were consumed: one for each applied step, and those left out."""
        self.left_out: list[dict[str, Any]] = []
        """The batches that moved nothing: position, how many batches from there on, and samples."""
        self.overflows = 0
        """Attempts that fp16 could not hold and that were made again with a smaller scale."""
        self.losses: list[Tensor] = []
        """The losses of the samples in the last closed step, (B,) for each of this rank's micro-batches."""
        self.grad_norm: float | Tensor = 0.0
        self.is_averaged = False
        """Whether the module computes with an average at this moment."""
        self._micro = 0
        self._losses: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._attempts = 0
        self._applied: dict[int, Tensor] = {}  # step -> the loss, and the sums of `backward`
        module = self._build(build, ds_config(config, ranks.world))
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert trained, "the method's module has no parameter that learns"
        self._start(module, trained)
        self._trained = [*trained.values()]
        # Its own looks through what is frozen, too, at every step of stage 0.
        self.deepspeed.zero_grad = self._forget_gradients
        if ranks.world == 1 and config.engine.zero_stage == 0:
            # It would copy every gradient into a bucket and back, to add it to nothing.
            self.deepspeed.enable_backward_allreduce = False
        weights.check(self.deepspeed.module)
        shards.fill_frozen(self.deepspeed, weights)
        shards.fill(self.deepspeed, weights)
        if settle is not None and config.engine.zero_stage < 3:
            settle(self.deepspeed.module)
            self._name_again()
        self.scale = LossScale(getattr(self.deepspeed.optimizer, "loss_scaler", None))
        # A sample that reaches no weight, as one without the word that is learned, binds nothing.
        self._nothing = torch.zeros(())
        self.binding = next(iter(trained.values())).register_hook(lambda g: g + self._nothing.to(g.dtype))
        """Makes a gradient not finite where some loss is not."""

    def _start(self, module: nn.Module, trained: dict[str, nn.Parameter]) -> None:
        """Give the module and its optimizer to DeepSpeed."""
        config = self.config
        if config.engine.offload_optimizer == "nvme":
            reader.load()
        self.swap = swap.folder_of(config, self)
        """This process's folder on the disk where the optimizer waits; None where it waits elsewhere."""
        place = self.swap.path if self.swap else None
        learns = sum(shards.size_of(p) for p in trained.values())
        settings = ds_config(config, self.ranks.world, learns, place)
        base = optimizer.build(config, trained, offload.stepping(config, self.ranks.device))
        # DeepSpeed takes parameters and optimizer together; without the list it would pass frozen ones too.
        by_blocks = blocks.as_one(module) if config.engine.zero_stage == 3 else nullcontext()
        with by_blocks, redirect_stdout(io.StringIO()):  # some of its optimizers print memory figures
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=base, model_parameters=[*trained.values()], config=settings
            )
        gradients.take_over(self.deepspeed)
        if self.autocast:
            module.forward = self._cast(module.forward)
        if place is not None:
            states = *STATES[config.optimizer.name], *profiles.kinds(config.ema)
            swap.prepare(self.deepspeed, states)

    def _cast(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass under autocast, which DeepSpeed, on a GPU, switches off around its own call."""

        @wraps(forward)
        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.ranks.device.type, torch.bfloat16):
                return forward(*args, **kwargs)

        return cast

    def _name_again(self) -> None:
        """Have DeepSpeed's table of names, which its optimizer shares, let go of what is packed now."""
        named = self.deepspeed.module.named_parameters()
        self.deepspeed.param_names.clear()
        self.deepspeed.param_names.update((parameter, name) for name, parameter in named)

    def _forget_gradients(self) -> None:
        for param in self._trained:
            param.grad = None

    def _build(self, build: Callable[[], nn.Module], settings: dict[str, Any]) -> nn.Module:
        with shards.Unfilled(), warnings.catch_warnings():
            # At stage 3 a layer's parts may lie elsewhere before torch wants to draw them.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            if self.config.engine.zero_stage < 3:
                return build()
            # Each layer is cut into the ranks' parts as soon as it exists, so that no rank holds the whole.
            # The numbers' format is read from the settings: a `dtype` given here is made bf16 wherever
            # DeepSpeed finds no fp16, as on most CPUs (0.19.8, `a or b if c else d`).
            with deepspeed.zero.Init(config_dict_or_path=settings):
                module = build()
        for part in module.modules():
            # CLIP asks this table for its length before the table's own forward pass has gathered it.
            table = getattr(part, "position_embedding", None)
            if isinstance(table, nn.Embedding):
                deepspeed.zero.register_external_parameter(part, table.weight)
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass in the run's arithmetic."""
        return self.deepspeed(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters, as nn.Module gives them."""
        return self.deepspeed.module.parameters()

    @contextmanager
    def drawing(self) -> Iterator[Any]:
        """The module for pictures: no gradients, the run's arithmetic. All ranks run it equally often."""
        with torch.no_grad(), torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.autocast):
            yield self.deepspeed.module

    @contextmanager
    def averaged(self, kind: str | None = None) -> Iterator[None]:
        """Within it the module computes with an average of the weights; all ranks enter and leave together.

        kind: "ema", or "ema_0.05" of a profile; unset: the first that the run keeps. Afterwards every weight
        and state is what it was, to the bit. Without an average, and before the first step, nothing happens.
        """
        kept = profiles.kinds(self.config.ema)
        assert kind is None or kind in kept, f"the run keeps {kept}, not {kind}"
        if not kept or self.step_count == 0:
            yield
            return
        assert not self.is_averaged, "the module computes with an average already"
        self.is_averaged = True
        try:
            with ema.swapped(self.deepspeed, kind or kept[0]):
                yield
        finally:
            self.is_averaged = False

    def backward(self, losses: Tensor, sums: Tensor | None = None) -> None:
        """Add a micro-batch's gradient; losses: (B,), one per sample of this rank's micro-batch.

        The gradient of an optimizer step is that of the mean over the global batch, whatever the split. It is
        not finite where a loss is not. sums: (K,) fp32, what else `metrics` adds up over micro-batches, steps
        and ranks, K the same at every call.
        """
        self._nothing = 0 * losses.detach().sum()
        share = binding(losses).sum() * (self.ranks.world * self.accumulation / self.config.batch_size)
        # DeepSpeed divides by accumulation and averages over ranks.
        self.deepspeed.backward(share)
        self._losses.append(losses.detach())
        self._sums += [] if sums is None else [sums]

    def step(self) -> bool:
        """Close a micro-batch; on the last of a global batch move the weights.

        Returns True where the optimizer step was applied. False: not the last micro-batch, or the gradient
        was not finite and nothing was changed.
        """
        assert not self.is_averaged, "a step in the middle of `averaged` would lose the weights"
        last = self._micro == self.accumulation - 1
        assert self.deepspeed.is_gradient_accumulation_boundary() == last, (
            "DeepSpeed counts other micro-batches"
        )
        self._micro = 0 if last else self._micro + 1
        if last:
            self.scale.remember()
            self._set_rates()
            if self.config.engine.zero_stage == 3:
                shards.settle_gradients(self.deepspeed)
            if self.config.engine.zero_stage == 0 and not self._clip():
                self.deepspeed.zero_grad()
                self.deepspeed.micro_steps += 1
                return self._close(False)
        self.deepspeed.step()
        if not last:
            return False
        if self.config.engine.zero_stage:
            self.grad_norm = self.deepspeed.get_global_grad_norm()
        return self._close(self.deepspeed.was_step_applied())

    def _close(self, applied: bool) -> bool:
        share = self.config.batch_size / self.ranks.world
        self.step_loss = torch.stack([losses.sum() for losses in self._losses]).sum() / share
        self.losses, self._losses = self._losses, []
        sums, self._sums = self._sums, []
        self._attempts += 1
        if applied:
            self.step_count += 1
            self.position += 1
            more = [torch.stack(sums).sum(0)] if sums else []
            self._applied[self.step_count] = torch.cat([self.step_loss.reshape(1), *more])
        return applied

    def _set_rates(self) -> None:
        """Learning rate and averages' shares of the coming step, as functions of the step alone."""
        factor = optimizer.lr_factor(self.config, self.step_count)
        self.lr = self.config.peak_lr() * factor
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if self.config.ema.enabled:
            self.deepspeed.basic_optimizer.shares = profiles.shares(self.config.ema, self.step_count)

    def _clip(self) -> bool:
        """Stage 0 clips here, because DeepSpeed tells no gradient norm there; False if it is not finite."""
        limit = self.config.optimizer.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._trained, limit)
        self.grad_norm = norm.detach()
        return bool(torch.isfinite(norm))

    def leave_out(self, samples: list[int], until: int) -> None:
        """Go on with the batch of position `until`; samples: those of the batch before it, by number."""
        batches = until - self.position
        self.left_out.append({"position": self.position, "batches": batches, "samples": samples})
        self.position = until

    def forget(self) -> None:
        """Drop what was measured of steps that were undone, those after the present one."""
        self._applied = {step: loss for step, loss in self._applied.items() if step <= self.step_count}

    def metrics(self, more: Tensor | None = None) -> dict[str, Any]:
        """What the log is told, on all ranks together: one sum over them, and one wait for the device.

        loss: the mean over every sample of every applied step since the last call. grad_norm: of the last
        step's gradient before clipping. lr: of that step. skipped: the share of the attempts since the last
        call that moved nothing, or were undone. sums: those of `backward` over these steps and all ranks,
        (K,). more: those of the argument over all ranks, an fp32 vector on the device.
        """
        steps, world = [*self._applied.values()], self.ranks.world
        told = torch.stack(steps).sum(0)  # (1 + K,)
        every = self.ranks.mean(told if more is None else torch.cat([told, more])) * world
        norm = torch.as_tensor(self.grad_norm, dtype=torch.float32, device=every.device).reshape(1)
        *numbers, norm_told = torch.cat([every, norm]).tolist()
        skipped = 1 - len(steps) / max(self._attempts, len(steps))
        self._applied, self._attempts = {}, 0
        return {
            "loss": numbers[0] / (world * len(steps)),
            "lr": self.lr,
            "grad_norm": norm_told if isinstance(self.grad_norm, Tensor) else float(self.grad_norm),
            "skipped": skipped,
            "sums": numbers[1 : len(told)],
            "more": numbers[len(told) :],
        }


def binding(losses: Tensor) -> Tensor:
    """The same losses (B,), with a gradient that is not finite where the loss is not.

    A loss may overflow where its gradient does not, as a square does. The factor is 1 for every finite loss,
    so that not a bit is changed, and no device is waited for.
    """
    return losses * (1 + 0 * losses.detach())
