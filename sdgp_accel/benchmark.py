"""`benchmark`: the training step, dense and SDGP, interleaved in one process and split into its parts."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdgp_accel import batch as batches
from sdgp_accel.benchmark_report import BenchmarkReport, ContenderResult
from sdgp_accel.config import SDGPConfig
from sdgp_accel.eligibility import Filter, check_model
from sdgp_accel.memory import step_peak_bytes
from sdgp_accel.nn import SDGPLayer
from sdgp_accel.plan import plan
from sdgp_accel.provenance import gpu_state, provenance
from sdgp_accel.report import SwapReport
from sdgp_accel.roofline import GPU, gpu_figures, known_gpu
from sdgp_accel.stages import StageRecorder
from sdgp_accel.swap import restore_layer
from sdgp_accel.targets import GEMM_NODES, Target, find_targets, gemm_node
from sdgp_accel.timing import Clock, HostClock, Stats, clock_for
from sdgp_accel.tuning.model import tune

OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

# A small learning rate: the model is to stay in the range of activations it started in, whatever it is fed.
_SGD: OptimizerFn = functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9)

# Steps issued back to back before the other contender's turn. A GPU's queue must stay full, as in training, and the
# first step after a turn, which starts on an empty queue, is not counted.
_TURN = {"cuda": (1, 5), "cpu": (0, 1)}  # uncounted, counted


def benchmark(
    model: nn.Module,
    batch: Any,
    config: SDGPConfig | None = None,
    *,
    filter_fn: Filter = None,
    loss_fn: batches.LossFn | None = None,
    optimizer: OptimizerFn = _SGD,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    peers: bool = False,
    steps: int = 30,
    warmup: int = 3,
    gpu: str | GPU | None = None,
    name: str | None = None,
) -> BenchmarkReport:
    """Time the training step of `model` on `batch`, dense and with SDGP, in turns, on the model's device.

    model: copied for every contender; the original is left alone. What torch.compile has wrapped in it runs eagerly in
        the contenders that are not compiled.
    batch: what a DataLoader yields: a tensor, a mapping of keyword arguments, or (inputs, targets).
    config, filter_fn: as for `accelerate_`; config None takes each SDGP layer of an accelerated model with its own
        configuration, whatever `filter_fn` selects. One contender is dense and the other prunes, whatever is swapped
        or switched off in `model`.
    loss_fn: ``(output, targets) -> scalar``; None takes the output's own loss or cross-entropy (`batch.loss`).
    optimizer: makes one from parameters.
    autocast: dtype of `torch.autocast` around forward and loss; float16 brings a GradScaler along.
    compile: compile both contenders. peers: also time both the other way, eager or compiled; one of these that cannot
        run is left out, and the report says why.
    steps, warmup: counted and uncounted steps of each contender.
    gpu: whose roofline the prediction uses; None for this GPU where it is a known one, else an A100. A model that
        `plan` cannot trace has none, and the report says why.
    name: what the report calls the model.

    Raises ValueError or TypeError for bad arguments. Nothing is accelerated on a CPU; the report says so.
    """
    for argument, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{argument} must be an int >= {least}; got {value!r}")
    batches.check_autocast(autocast)
    check_model(model)
    batches.check_loss_fn(loss_fn)
    if gpu is not None:
        gpu_figures(gpu)
    device = _device_of(model)
    batch = batches.to(batch, device)
    make = functools.partial(_Contender, model, batch, loss_fn=loss_fn, optimizer=optimizer, autocast=autocast)
    sdgp = (config, filter_fn)
    ways = (compile, not compile) if peers else (compile,)
    contenders = [make(compiled=compiled, sdgp=pruning) for compiled in ways for pruning in (None, sdgp)]
    clock = clock_for(device)
    with _cudnn_benchmark(), torch.enable_grad():
        left_out = {}
        for contender in tuple(contenders):
            try:
                contender.warm_up(clock, warmup)
            except RuntimeError as error:  # also torch.compile's own errors, and too little memory
                if contender.compiled == compile:
                    raise
                left_out[contender.name] = next(iter(str(error).splitlines()), type(error).__name__)
                contenders.remove(contender)
        if device.type == "cuda":
            _settle(contenders, clock)
        samples = _take_turns(contenders, clock, steps, *_TURN[device.type])
        origin = provenance(device)
        if device.type == "cuda":
            origin["gpu"]["state_under_load"] = _state_under_load(contenders[0], clock, device)
        results = [
            _result(contender, sample, *_shares(contender, clock, device, max(3, steps // 6)), device)
            for contender, sample in zip(contenders, samples, strict=True)
        ]
    swap = contenders[1].swap
    assert swap is not None
    if not swap.swapped:
        warnings.warn("benchmark found no layer to swap in this model; see the report's `swap`", stacklevel=2)
    configs = {layer.sdgp_config for layer in contenders[1].model.modules() if isinstance(layer, SDGPLayer)}
    shared = next(iter(configs), SDGPConfig()) if config is None and len(configs) < 2 else config
    where = gpu or known_gpu(origin["gpu"]["name"] if origin["gpu"] else "") or "a100"
    prediction, unpredicted = None, None
    try:
        prediction = plan(model, batch, where, config, filter_fn)
    except RuntimeError as error:
        unpredicted = next(iter(str(error).splitlines()))
    return BenchmarkReport(
        name=name or type(model).__name__,
        batch=batches.size(batch),
        accelerated="prune_compress" in results[1].stages and any(layer.backend == "cutlass" for layer in swap.swapped),
        contenders=tuple(results),
        swap=swap,
        prediction=prediction,
        settings={
            "config": None if shared is None else asdict(shared),  # None: layers differ
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "parameters": str(next(model.parameters()).dtype).removeprefix("torch."),
            "optimizer": type(contenders[0].optimizer).__name__,
            "steps": steps,
            "warmup": warmup,
            "left_out": left_out,
            "unpredicted": unpredicted,
        },
        provenance=origin,
    )


class _Contender:
    """One way to train the model: its own copy, optimizer and step."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss_fn: batches.LossFn | None,
        optimizer: OptimizerFn,
        autocast: torch.dtype | None,
        compiled: bool,
        sdgp: tuple[SDGPConfig | None, Filter] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).train()
        self.swap: SwapReport | None = None
        targets: list[Target] = []
        if sdgp is not None:
            targets, self.swap = find_targets(self.model, *sdgp)
        _make_dense(self.model)
        for target in targets:
            target.prune()
        self.compiled = compiled
        self.name = ("dense" if sdgp is None else "SDGP") + (", compiled" if compiled else "")
        self.optimizer = optimizer(self.model.parameters())
        self._batch, self._loss_fn, self._autocast = batch, loss_fn, autocast
        self._forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self._device_type = next(model.parameters()).device.type
        self._scaler = torch.amp.GradScaler(self._device_type, enabled=autocast == torch.float16)
        self._last_loss: Tensor | None = None

    def step(self, clock: Clock) -> tuple[Any, Any, Any, Any]:
        """One training step; the moments of its start and of the ends of forward, backward and optimizer."""
        with contextlib.nullcontext() if self.compiled else torch.compiler.set_stance("force_eager"):
            return self._step(clock)

    def _step(self, clock: Clock) -> tuple[Any, Any, Any, Any]:
        start = clock.mark()
        with torch.autocast(self._device_type, self._autocast, enabled=self._autocast is not None):
            loss = batches.training_loss(self._forward, self._batch, self._loss_fn)
        forward = clock.mark()
        torch.autograd.backward(self._scaler.scale(loss))
        backward = clock.mark()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        end = clock.mark()
        self._last_loss = loss.detach()
        return start, forward, backward, end

    def warm_up(self, clock: Clock, steps: int) -> None:
        """Decide what each layer runs, and take steps that nobody counts."""
        if self.swap is not None:
            tuned = tune(self.model, self._batch, autocast=self._autocast)
            layers = zip(tuned.layers, self.swap.layers, strict=True)
            self.swap = SwapReport(tuple(layer if layer.swapped else skipped for layer, skipped in layers))
        for _ in range(steps):
            self.step(clock)
        clock.synchronize()

    def last_loss(self) -> float:
        """Of the latest step; waits for it."""
        return float("nan") if self._last_loss is None else float(self._last_loss)


def _make_dense(model: nn.Module) -> None:
    """Make ordinary layers of the SDGP layers of `model`, and switch off what cannot be one again."""
    for module in model.modules():
        if isinstance(module, SDGPLayer):
            try:
                restore_layer(module)
            except RuntimeError:  # its class was derived from an SDGP layer's
                module.sdgp_active = False


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type not in _TURN:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"model must be on one CPU or CUDA device; found {found}")
    return devices.pop()


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN search for its fastest algorithms, as a careful user of the dense model would."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _settle(contenders: list[_Contender], clock: Clock) -> None:
    """Run until two rounds in a row take the same time within 1 %, at most 20: clocks and allocator have settled."""
    previous = float("inf")
    for _ in range(20):
        marks = [contender.step(clock) for contender in contenders for _ in range(3)]
        clock.synchronize()
        took = clock.seconds(marks[0][0], marks[-1][-1])
        if abs(took - previous) < 0.01 * previous:
            return
        previous = took


Sample = list[tuple[float, float, float]]  # seconds of forward, backward, optimizer of each counted step


def _take_turns(contenders: list[_Contender], clock: Clock, steps: int, uncounted: int, counted: int) -> list[Sample]:
    """`steps` counted steps of each contender; the order is reversed from round to round."""
    samples: list[Sample] = [[] for _ in contenders]
    order = list(range(len(contenders)))
    while len(samples[0]) < steps:
        for index in order:
            marks = [contenders[index].step(clock) for _ in range(uncounted + counted)][uncounted:]
            clock.synchronize()
            for start, forward, backward, end in marks[: steps - len(samples[index])]:
                spans = ((start, forward), (forward, backward), (backward, end))
                samples[index].append(tuple(clock.seconds(*span) for span in spans))  # type: ignore[arg-type]
        order.reverse()
    return samples


def _shares(
    contender: _Contender, clock: Clock, device: torch.device, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """What the stages, and what the layers, take of the backward: medians of shares, from steps of their own.

    Shares, because a step that is watched is not quite as fast as the counted ones.
    """
    stages: dict[str, list[float]] = {}
    layers: dict[str, list[float]] = {}
    for _ in range(steps):
        recorder = StageRecorder(device)
        # Hooks inside a compiled graph would break it; the stages of SDGP's own ops are recorded there all the same.
        watched: contextlib.AbstractContextManager[list[LayerSpan]]
        watched = contextlib.nullcontext([]) if contender.compiled else _watch_layers(contender.model, clock)
        with recorder, watched as spans:
            _, start, end, _ = contender.step(clock)
            clock.synchronize()
        backward = clock.seconds(start, end)
        seconds_of_stage, seconds_of_layer = recorder.seconds(), dict.fromkeys((span.layer for span in spans), 0.0)
        for span in spans:
            seconds = clock.seconds(span.start, span.end)
            seconds_of_layer[span.layer] += seconds
            if span.dense:
                seconds_of_stage["dense_layers"] = seconds_of_stage.get("dense_layers", 0.0) + seconds
        for recorded, seconds_of in ((stages, seconds_of_stage), (layers, seconds_of_layer)):
            for key, seconds in seconds_of.items():
                recorded.setdefault(key, []).append(seconds / backward)
    return tuple({key: Stats.of(shares).median for key, shares in found.items()} for found in (stages, layers))  # type: ignore[return-value]


class LayerSpan(NamedTuple):
    """The moments between which one call of one layer was differentiated; `dense`: by torch's own node."""

    layer: str
    dense: bool
    start: Any
    end: Any


@contextlib.contextmanager
def _watch_layers(model: nn.Module, clock: Clock) -> Iterator[list[LayerSpan]]:
    """Collect a span for the backward of every Linear and Conv2d.

    Hooks on the autograd node rather than on the module: they bracket exactly dgrad and wgrad, and do not mind what
    is done in place to the layer's output.
    """
    spans: list[LayerSpan] = []

    def watch(name: str, module: nn.Module, args: Any, output: Any) -> None:
        node = gemm_node(output.grad_fn)
        if node is not None:
            starts: list[Any] = []
            dense = node.name() in GEMM_NODES
            node.register_prehook(lambda gradients: starts.append(clock.mark()))
            node.register_hook(lambda inputs, outputs: spans.append(LayerSpan(name, dense, starts.pop(), clock.mark())))

    handles = [
        module.register_forward_hook(functools.partial(watch, name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def _state_under_load(contender: _Contender, clock: Clock, device: torch.device) -> dict[str, str]:
    """Clocks and power while steps are queued, not when the GPU has gone idle."""
    for _ in range(20):
        contender.step(clock)
    return gpu_state(device)


def _result(
    contender: _Contender,
    sample: Sample,
    stage_shares: dict[str, float],
    layer_shares: dict[str, float],
    device: torch.device,
) -> ContenderResult:
    forward, backward, optimizer = (Stats.of(part) for part in zip(*sample, strict=True))
    steps = tuple(sum(parts) for parts in sample)
    return ContenderResult(
        name=contender.name,
        sdgp=contender.swap is not None,
        compiled=contender.compiled,
        step=Stats.of(steps),
        forward=forward,
        backward=backward,
        optimizer=optimizer,
        stages={stage: share * backward.median for stage, share in stage_shares.items()},
        layers={layer: share * backward.median for layer, share in layer_shares.items()},
        peak_bytes=step_peak_bytes(lambda: contender.step(HostClock()), device),
        loss=contender.last_loss(),
        samples=steps,
    )
