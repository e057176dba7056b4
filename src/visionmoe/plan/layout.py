"""How a model is spread over devices, and sizes in words ("80GB")."""

import re
from dataclasses import dataclass

from visionmoe.config import ModelConfig, check_names

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """dp: replicas; fsdp: shards of every parameter; ep: parts into which the experts are dealt out.

    dp * fsdp * ep devices, each with its own images. Dense parameters are whole on every device (fsdp = 1) or cut
    into fsdp * ep shards; experts are cut into ep * fsdp.
    """

    dp: int = 1
    fsdp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "fsdp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a layout must be >= 1, got {getattr(self, name)}")

    @property
    def devices(self) -> int:
        return self.dp * self.fsdp * self.ep

    @property
    def dense_shards(self) -> int:
        return self.fsdp * self.ep if self.fsdp > 1 else 1

    @property
    def expert_shards(self) -> int:
        return self.fsdp * self.ep

    def __str__(self) -> str:
        return f"dp={self.dp},fsdp={self.fsdp},ep={self.ep}"

    def check(self, config: ModelConfig) -> None:
        """ValueError where the model's experts cannot be cut so."""
        moe = config.moe
        if self.ep > 1 and not moe.layers:
            raise ValueError(f"ep must be 1 for a model without experts, got {self}")
        if self.ep > 1 and moe.router == "soft":
            raise ValueError(f"ep must be 1 for a model with router 'soft', got {self}")
        if moe.layers and moe.num_experts % self.ep:
            raise ValueError(f"ep must divide the number of experts, got {self} and {moe.num_experts} experts")
        if moe.layers and self.fsdp > 1 and (config.hidden_size % self.fsdp or config.mlp_dim % self.fsdp):
            raise ValueError(
                f"fsdp must divide the widths of the experts, got {self}, D {config.hidden_size} and F {config.mlp_dim}"
            )


def parse_layout(text: str, devices: int) -> Layout:
    """ "dp=2,ep=4" -> Layout; what is not named is 1. ValueError for other names and another product than `devices`."""
    given: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        check_names("a layout", [name], ("dp", "fsdp", "ep"))
        if not equals or not number.isdecimal() or name in given:
            raise ValueError(f"a layout must be like dp=2,fsdp=1,ep=4, got {text!r}")
        given[name] = int(number)
    layout = Layout(**given)
    if layout.devices != devices:
        raise ValueError(f"the product of a layout must be the number of devices, got {text!r} and {devices} devices")
    return layout


def layouts(config: ModelConfig, devices: int) -> list[Layout]:
    """All layouts of so many devices that this model can have."""
    found = []
    for ep in _divisors(devices):
        for fsdp in _divisors(devices // ep):
            layout = Layout(devices // ep // fsdp, fsdp, ep)
            try:
                layout.check(config)
            except ValueError:
                continue
            found.append(layout)
    return found


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def parse_bytes(text: str) -> int:
    """ "80GB" -> 80 * 10**9, "80GiB" -> 80 * 2**30; B, KB, MB, GB, TB and KiB ... TiB; a unit must be given."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"a size must be like 80GB, 80GiB or 500MB, got {text!r}")
    return round(float(match[1]) * unit)
