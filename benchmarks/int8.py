"""Whether int8 weights pay for inference on a CPU: products alone, whole models, and their accuracy.

    python benchmarks/int8.py --out benchmarks/results/int8.json

products: E = 8 products of R rows with GELU behind, as the first layer of the experts has them: float32, bfloat16
packed by oneDNN, and three int8 ways: `qlinear_pointwise` (with the rows quantised in each product; "rows ready"
without that), `quantized.linear_dynamic`, and `_weight_int8pack_mm` (int8 weights, bfloat16 rows).
models: all linear layers of blocks and experts through packed bfloat16, or int8 with one scale per output channel and
one per tensor of rows, that is either measured on every call ("dynamic") or beforehand on other images ("static": the
first layer of an MLP then writes int8). Everything else is the same bfloat16 model. Ways take turns; medians.
Target: int8 is at least 1.15 times as fast as packed bfloat16 and loses at most 0.2 points of accuracy.
"""

import argparse
import copy
import datetime
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import visionmoe as vm
from visionmoe.data import DataConfig, EvalLoader
from visionmoe.evaluate.timing import device_name, take_turns
from visionmoe.files import write_json
from visionmoe.model import dispatch
from visionmoe.model.inference import combine_rows, gather_rows
from visionmoe.model.layers import Attention, Mlp
from visionmoe.model.moe import MoE
from visionmoe.model.packed import linear, pack
from visionmoe.model.segments import ROWS, Kept

BF16, INT8 = torch.bfloat16, torch.int8
SIZES = {"B/16": (768, 3072), "S/32": (512, 2048), "demo": (96, 384)}
SPEED_TARGET, LOSS_TARGET = 1.15, 0.2
_int8_product, _int8_pack = torch.ops.onednn.qlinear_pointwise, torch.ops.onednn.qlinear_prepack


class PackedLinear:
    """A linear layer in bfloat16, laid out once."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.weight, self.bias = pack(weight.detach().to(BF16)), bias.detach().to(BF16)

    def __call__(self, x: Tensor, gelu: str | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)


class Int8Linear:
    """A linear layer with int8 weights, one scale per output channel."""

    def __init__(self, weight: Tensor, bias: Tensor):
        self.scales, whole = quantised_weight(weight)
        self.weight, self.zeros = _int8_pack(whole, None), torch.zeros(len(whole), dtype=torch.int64)
        self.bias = bias.detach().float()

    def __call__(self, x: Tensor, scale: float, gelu: str | None = None, out: float | None = None) -> Tensor:
        """x int8 with its scale -> bfloat16, or int8 with the scale `out`."""
        after = ("none", [], "") if gelu is None else ("gelu", [], gelu)
        to = (1.0, 0, BF16) if out is None else (out, 0, INT8)
        return _int8_product(x, scale, 0, self.weight, self.scales, self.zeros, self.bias, *to, *after)


class Scale:
    """The scale of a tensor of rows: measured on every call, or the largest of the calls before `fixed` was set."""

    def __init__(self) -> None:
        self.fixed, self.largest = False, 0.0

    def __call__(self, x: Tensor) -> tuple[Tensor, float]:
        if not self.fixed:
            low, high = torch.aminmax(x)
            largest = max(float(high), -float(low), 1e-12)
            self.largest = max(self.largest, largest)
        scale = (self.largest if self.fixed else largest) / 127
        scaled = x.mul(1 / scale).round_()
        return (scaled.clamp_(-127, 127) if self.fixed else scaled).to(INT8), scale


class Packed(nn.Module):
    """In place of an nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = PackedLinear(linear.weight, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


class Quantised(nn.Module):
    """In place of an nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear, self.scale = Int8Linear(linear.weight, linear.bias), Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(*self.scale(x.flatten(0, -2))).view(*x.shape[:-1], -1)


class Pairs(nn.Module):
    """The two linear layers of an MLP (one pair) or of experts (E pairs) with GELU between them."""

    def __init__(self, first: Sequence, second: Sequence, gelu: str):
        super().__init__()
        self.first, self.second, self.gelu = first, second, gelu
        self.input, self.hidden = Scale(), Scale()

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the products take, made once for all experts."""
        return (x,) if isinstance(self.first[0], PackedLinear) else self.input(x)  # type: ignore[return-value]

    def run(self, number: int, x: Tensor, *scale: float) -> Tensor:
        first, second = self.first[number], self.second[number]
        if isinstance(first, PackedLinear):
            return second(first(x, self.gelu))
        if self.hidden.fixed:
            out = self.hidden.largest / 127
            return second(first(x, *scale, self.gelu, out), out)
        return second(*self.hidden(first(x, *scale, self.gelu)))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(0, *self.rows(x.flatten(0, -2))).view(x.shape)


def infer(tokens: Tensor, weights: Tensor, kept: Kept, experts: Pairs) -> Tensor:
    """`visionmoe.model.inference.infer_segments` over such pairs."""
    rows, *scale = experts.rows(tokens)
    parts, position = gather_rows(rows, kept, [count + -count % ROWS for count in kept.counts])
    results = [experts.run(expert, part, *scale) for expert, part in enumerate(parts) if len(part)]
    return combine_rows(torch.cat(results), position, weights, kept.token, len(tokens))


def converted(model: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> nn.Module:
    """A bfloat16 copy whose blocks' linear layers are of this kind."""
    whole, model = model, copy.deepcopy(model).to(BF16).eval()
    for block, old in zip(model.blocks, whole.blocks, strict=True):  # type: ignore[union-attr,arg-type]
        assert isinstance(block.attn, Attention)
        module = Packed if kind is PackedLinear else Quantised
        block.attn.qkv, block.attn.proj = module(old.attn.qkv), module(old.attn.proj)
        if isinstance(old.mlp, Mlp):
            layers = [[kind(fc.weight, fc.bias)] for fc in (old.mlp.fc1, old.mlp.fc2)]
            block.mlp = Pairs(*layers, old.mlp.approximate)
        else:
            assert isinstance(old.mlp, MoE)
            stacks = (old.mlp.experts.fc1, old.mlp.experts.fc2)
            layers = [[kind(w, b) for w, b in zip(fc.weight, fc.bias, strict=True)] for fc in stacks]
            block.mlp.experts = Pairs(*layers, old.mlp.experts.approximate)
            block.mlp.dispatch = "segments"  # which `predict` replaces
    return model


def fix_scales(model: nn.Module, images: Tensor) -> nn.Module:
    """Measures the scales on these images, then keeps them."""
    predict(model, images)
    scales = [s for m in model.modules() for s in vars(m).values() if isinstance(s, Scale)]
    for scale in scales:
        scale.fixed = True
    return model


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    ours = dispatch.infer_segments
    quantised = any(isinstance(m, Pairs) for m in model.modules())
    dispatch.infer_segments = infer if quantised else ours  # type: ignore[assignment]
    try:
        return model(images.to(next(model.parameters()).dtype)).logits.float()
    finally:
        dispatch.infer_segments = ours


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> scales (out,) float32, int8 (out, in)."""
    weight = weight.detach().float()
    scales = weight.abs().amax(1).clamp_min(1e-12) / 127
    return scales, (weight / scales[:, None]).round().to(INT8)


def product_rows(size: str, rows: int, repeats: int) -> dict:
    hidden, width = SIZES[size]
    weights, bias = torch.randn(8, width, hidden) * 0.02, torch.randn(width) * 0.1
    x = torch.randn(rows, hidden)
    packed, quantised = ([kind(w, bias) for w in weights] for kind in (PackedLinear, Int8Linear))
    only = [quantised_weight(w) for w in weights]
    stored = [
        torch.ops.quantized.linear_prepack(torch.quantize_per_channel(w, s, torch.zeros(width), 0, torch.qint8), bias)
        for w, (s, _) in zip(weights, only, strict=True)
    ]
    half, half_bias, scale = x.to(BF16), bias.to(BF16), Scale()
    ready = scale(half)
    gelu = functools.partial(F.gelu, approximate="tanh")
    ways: dict[str, Callable[[], Any]] = {
        "float32": lambda: [gelu(F.linear(x, w, bias)) for w in weights],
        "bfloat16 packed": lambda: [layer(half, "tanh") for layer in packed],
        "int8 qlinear_pointwise": lambda: [layer(*scale(half), "tanh") for layer in quantised],
        "int8 qlinear_pointwise, rows ready": lambda: [layer(*ready, "tanh") for layer in quantised],
        "int8 linear_dynamic": lambda: [gelu(torch.ops.quantized.linear_dynamic(x, w)) for w in stored],
        "int8 _weight_int8pack_mm": lambda: [
            gelu(torch.ops.aten._weight_int8pack_mm(half, w, s.to(BF16)) + half_bias) for s, w in only
        ],
    }
    with torch.no_grad():
        timing = take_turns(list(ways.values()), rounds=repeats, max_seconds=20)
    reference = timing.seconds[1]
    found = {
        name: {"ms": round(s * 1e3, 3), "speed": round(reference / s, 3)}
        for name, s in zip(ways, timing.seconds, strict=True)
    }
    return {"size": size, "rows": rows, "ways": found}


def model_row(name: str, model: vm.VisionTransformer, images: Tensor, repeats: int) -> tuple[dict, dict]:
    """The models by their way, and images per second of each."""
    model = model.eval()
    dynamic = converted(model, Int8Linear)
    static = fix_scales(converted(model, Int8Linear), images[: max(8, len(images) // 2)])
    models: dict[str, nn.Module] = {
        "float32": model,
        "bfloat16 packed": converted(model, PackedLinear),
        "int8 dynamic": dynamic,
        "int8 static": static,
    }
    runs = [functools.partial(forget, functools.partial(predict, m, images)) for m in models.values()]
    timing = take_turns(runs, rounds=repeats, max_seconds=60)
    rates = {way: len(images) / seconds for way, seconds in zip(models, timing.seconds, strict=True)}
    speed = {way: round(rate / rates["bfloat16 packed"], 3) for way, rate in rates.items()}
    row = {"model": name, "batch": len(images), "images_per_second": {w: round(r, 2) for w, r in rates.items()}}
    return models, row | {"speed": speed}


def forget(call: Callable[[], object]) -> None:
    call()


def accuracy(models: dict[str, nn.Module], loader: EvalLoader) -> dict[str, float]:
    """Top-1 in per cent."""
    hits, count = dict.fromkeys(models, 0), 0
    for images, labels, _ in loader:
        count += len(labels)
        for way, model in models.items():
            hits[way] += int((predict(model, images).argmax(1) == labels).sum())
    return {way: round(100 * hit / count, 2) for way, hit in hits.items()}


def trained(folder: str, data: str, split: str, repeats: int) -> dict:
    model = vm.load(folder)
    config = model.config
    loaders = [
        EvalLoader(DataConfig(source=data, eval_split=s, image_size=config.image_size, in_channels=config.in_channels))
        for s in (split, "train[:256]")
    ]
    images = next(iter(loaders[1]))[0]
    models, row = model_row(folder, model, images, repeats)
    found = accuracy(models, loaders[0])
    row |= {"data": data, "split": split, "images": len(loaders[0].source), "top1": found}
    return row | {"points_lost": {w: round(found["float32"] - a, 2) for w, a in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--trained", nargs=3, action="append", default=[], metavar=("FOLDER", "DATA", "SPLIT"),
        help="a trained model and its images, for the accuracy",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=11)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    products = []
    for size, rows in [("B/16", 60), ("B/16", 200), ("B/16", 400), ("S/32", 60), ("S/32", 200), ("demo", 400)]:
        products.append(product_rows(size, rows, arguments.repeats))
        print(products[-1], flush=True)
    models = [trained(*given, arguments.repeats) for given in arguments.trained]
    for name, batch in (("vmoe_b16_e8_every2", 8), ("vmoe_s32_e8_last2", 8)):
        if name in vm.list_models():
            large = vm.create_model(name)
            for block in large.moe_layers:  # random gates prefer some experts; these spread the tokens
                nn.init.normal_(large.moe_layer(block).router.gate.weight, std=1.0)  # type: ignore[union-attr]
            models.append(model_row(name, large, torch.rand(batch, 3, *large.config.image_hw) * 2 - 1, 5)[1])
            del large
    for row in models:
        print(row, flush=True)
    machine = {"cpu": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "torch": torch.__version__}
    written = {"date": str(datetime.date.today()), "machine": machine, "command": " ".join(["python", *sys.argv])}
    targets = {"speed": SPEED_TARGET, "points_lost": LOSS_TARGET}
    write_json(arguments.out, {**written, "targets": targets, "products": products, "models": models})


if __name__ == "__main__":
    main()
