"""Names of devices, under which their tuned tables are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from slimkernels.timing import cpu_name

_ZEN = {(23, 0): "zen", (23, 3): "zen2", (25, 0): "zen3", (25, 1): "zen4", (26, 0): "zen5"}
_INTEL = {
    79: "broadwell",
    85: "skylake",
    106: "icelake",
    108: "icelake",
    143: "sapphirerapids",
    207: "emeraldrapids",
    173: "graniterapids",
    174: "graniterapids",
}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _cpu_fields() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def cpu_device_name(info: Mapping[str, str]) -> str:
    """``amd-epyc-zen3`` from the fields of /proc/cpuinfo; no marketing digits, so that siblings share a table."""
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(info.get("vendor_id", ""))
    brand = next((b for b in ("epyc", "ryzen", "xeon", "core") if b in info.get("model name", "").lower()), None)
    try:
        family, model = int(info.get("cpu family", "")), int(info.get("model", ""))
    except ValueError:
        vendor = None
        family = model = 0
    if vendor is None:
        return _slug(info.get("model name", "") or cpu_name() or "cpu")
    if vendor == "amd":
        fourth = family == 25 and (0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF)
        second = family == 23 and model >= 0x30
        core = _ZEN.get((family, 1 if fourth else 3 if second else 0), f"family{family}")
    else:
        core = _INTEL.get(model, f"model{model}") if family == 6 else f"family{family}"
    return "-".join(filter(None, (vendor, brand, core)))


@lru_cache(maxsize=16)
def device_name(device: str = "cpu", index: int = -1) -> str:
    """The name under which a device's table is kept: ``amd-epyc-zen3``, ``nvidia-h200``."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return "no-cuda-device"
        name = torch.cuda.get_device_name(None if index < 0 else index)
        return _slug(name if name.lower().startswith("nvidia") else f"nvidia {name}")
    return cpu_device_name(_cpu_fields())
