"""What devices and links can do, each number with its source; YAML files for machines not listed.

    device    peak, sustained matrix products, memory, memory bandwidth, links inside a node
    cluster   devices per node, nodes, the network between them

The time of a matrix product of m x k by k x n on a device is

    2 m n k / (matmul * efficiency(k)) + launch        efficiency(k) = sustained * k / (k + half_inner)

or the time to move its operands, where that is longer.  `matmul` is the fastest product anyone
measured on the device.  The curve says what a training run reaches of it: `sustained` for a long
inner dimension (clocks under load, waves that do not fill), less for a short one, whose tiles have
little to do between their first load and their last store.  Fused attention likewise: `attention`
for long sequences and heads of 128 features, less for short ones.  planner/generations.py says what
each make of device reaches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_lite.blueprint.devices import ACCELERATORS, short_name
from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.planner import generations
from megatron_lite.planner.generations import (
    AMPERE,
    ASSUMED,
    BLACKWELL,
    CORES,
    HOPPER,
    MAMF,
    DeviceMake,
)
from megatron_lite.planner.hosts import HOSTS

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator and its links; rates in units per second, one direction, per device.

    sources: field -> where its number comes from.
    """

    name: str
    peak_tflops: float
    """Dense fp16 or bf16, the denominator of MFU."""
    matmul_tflops: float
    """Fastest bf16 product measured."""
    sustained: float
    """Share of matmul_tflops that products of a training run reach."""
    attention: float
    """Share of matmul_tflops that a fused attention kernel reaches, forward and backward together,
    with long sequences and heads of 128 features."""
    memory_gb: float
    """Capacity in GB of 1e9 bytes."""
    bandwidth_gb_s: float
    """Of the device's memory."""
    link_gb_s: float
    """Between devices of one node."""
    network_gb_s: float
    """Between nodes, per device."""
    devices_per_node: int
    sources: Mapping[str, str]
    half_inner: float = generations.HALF_INNER
    """Inner dimension at which a product reaches half of its rate."""
    attention_half_length: float = 500.0
    """Sequence at which it reaches half of that: blocks on the diagonal, and few of them."""
    attention_half_head: float = 18.0
    """Head size at which its products reach half of their rate, their softmax the other half."""
    launch_seconds: float = 5e-6
    """Fill and drain of one kernel."""
    host_seconds: float = 5e-6
    """Time in which the host starts one kernel."""
    spread: float = 0.0
    """How unequal nodes are: relative standard deviation of the time of one."""
    memory_efficiency: float = 0.8
    """Share of bandwidth_gb_s that elementwise kernels reach."""
    optimizer_efficiency: float = 0.8
    """Share of bandwidth_gb_s that the update of masters and moments reaches."""
    overlap: float = 1.0
    """Share of communication meant to run under products that does; the rest is what the products lose
    to its kernels.  None where both share cores."""
    link_efficiency: float = 0.8
    """Share of link_gb_s that ring collectives reach."""
    network_efficiency: float = 0.8
    """Share of network_gb_s that messages between nodes reach."""
    link_latency_seconds: float = 10e-6
    """Start of one collective or message inside a node."""
    network_latency_seconds: float = 20e-6
    """The same between nodes."""
    fp32_rate: float = 1 / 16
    """fp32 products without TF32, as a multiple of the 16-bit rate (A100: 19.5 of 312)."""
    tf32_rate: float = 0.5
    """Products of fp32 tensors in TF32, likewise (A100: 156 of 312)."""
    dropout_values: float = 41.0
    """Values moved to make an element of a dropout mask where nothing is compiled (kernels/random.py)."""
    bf16: bool = True
    """Whether it has units for bf16, and for TF32; NVIDIA's do since Ampere."""
    host_memory_gb: float = 0.0
    """Of a node, for state that is kept there; 0 where it is not known."""
    host_bandwidth_gb_s: float = 300.0
    """Of that memory; of two processors, each with six channels, unless more is known."""
    host_link_gb_s: float = 32.0
    """Between host and device, one direction; PCIe 4, unless more is known."""
    cpu: bool = False
    """Cores of a host instead of an accelerator: other attention kernels, no context."""

    @property
    def memory_bytes(self) -> float:
        """Capacity in bytes."""
        return self.memory_gb * 1e9

    @property
    def is_fitted(self) -> bool:
        """Whether `sustained` comes from measured steps, or from who knows the device."""
        return self.sources.get("sustained", "").startswith(("fitted", "given"))

    def product_seconds(self, rows: float, inner: float, columns: float) -> float:
        """Time of a 16-bit matrix product [rows, inner] x [inner, columns]."""
        flops = 2.0 * rows * inner * columns
        moved = 2.0 * (rows * inner + inner * columns + rows * columns)
        compute = flops / (self.matmul_tflops * 1e12 * self.efficiency(inner))
        return max(compute, self.moving_seconds(moved)) + self.launch_seconds

    def efficiency(self, inner: float) -> float:
        """Share of matmul_tflops that a product with this inner dimension reaches in training."""
        return self.sustained * inner / (inner + self.half_inner)

    def attention_flops(self, length: float, head_size: int) -> float:
        """FLOPs per second of a fused attention kernel on sequences of this length."""
        head, half = min(head_size, 128), self.attention_half_head
        by_head = head / (head + half) * (128 + half) / 128
        by_length = length / (length + self.attention_half_length)
        return self.matmul_tflops * 1e12 * self.attention * by_head * by_length

    def moving_seconds(self, moved_bytes: float) -> float:
        """Time of kernels that only move bytes through memory."""
        return moved_bytes / (self.bandwidth_gb_s * 1e9 * self.memory_efficiency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Machines to train on: `world_size` devices in nodes of `devices_per_node`."""

    device: Device
    world_size: int
    devices_per_node: int

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return -(-self.world_size // self.devices_per_node)

    @property
    def ranks_of_node(self) -> int:
        """Of one that is full, or of the only one."""
        return min(self.devices_per_node, self.world_size)

    @property
    def slowest(self) -> float:
        """Time of the slowest node as a multiple of the mean: the greatest of so many normal numbers."""
        return 1.0 + self.device.spread * math.sqrt(2.0 * math.log(self.num_nodes))

    def ring_seconds(self, payload_bytes: float, ranks: int, *, stride: int, passes: int) -> float:
        """A ring collective over `ranks` devices that lie `stride` ranks apart.

        payload_bytes: the whole tensor; passes: 2 for an all-reduce, 1 for all-gather and
        reduce-scatter.  A ring that leaves a node is as fast as its slowest hop: devices of a node
        that share a ring enter and leave it with all their network links together.
        """
        if ranks == 1:
            return 0.0
        device = self.device
        steps = passes * (ranks - 1)
        if stride * ranks <= self.devices_per_node:
            rate = device.link_gb_s * device.link_efficiency
            latency = device.link_latency_seconds
        else:
            together = max(1, self.devices_per_node // stride)
            rate = device.network_gb_s * device.network_efficiency * min(together, ranks)
            rate = min(rate, device.link_gb_s * device.link_efficiency)
            latency = device.network_latency_seconds
        # NCCL pipelines a ring: latency grows with its length, but a step costs a microsecond or two
        return steps / ranks * payload_bytes / (rate * 1e9) + latency + steps * 1e-6

    def message_seconds(self, payload_bytes: float, *, stride: int) -> float:
        """A message between ranks `stride` apart."""
        device = self.device
        if stride < self.devices_per_node:
            rate = device.link_gb_s * device.link_efficiency
            return device.link_latency_seconds + payload_bytes / (rate * 1e9)
        rate = device.network_gb_s * device.network_efficiency
        return device.network_latency_seconds + payload_bytes / (rate * 1e9)


_CPU_PEAK = 0.12


def _device(
    name: str, kind: DeviceMake, numbers: tuple[float, ...], per_node: int, **sources: str
) -> Device:
    cpu = name == "cpu"
    sources = {"sustained": kind.fitted, "attention": kind.measured, **sources}
    if not cpu:
        sources = {"peak_tflops": ACCELERATORS[name].source, **sources, **generations.GENERAL}
    matmul, memory, bandwidth, link, network = numbers
    host = HOSTS[name].fields if name in HOSTS else {}
    sources |= dict.fromkeys(host, HOSTS[name].source if host else "")
    return Device(
        name=name,
        peak_tflops=_CPU_PEAK if cpu else ACCELERATORS[name].peak_tflops,
        matmul_tflops=matmul,
        sustained=kind.sustained,
        attention=kind.attention,
        attention_half_length=kind.half_length,
        attention_half_head=kind.half_head,
        memory_gb=memory,
        bandwidth_gb_s=bandwidth,
        link_gb_s=link,
        network_gb_s=network,
        devices_per_node=per_node,
        sources=sources,
        cpu=cpu,
        bf16=not name.startswith("v100"),
        fp32_rate=1.0 if cpu else 1 / 16,
        half_inner=generations.HALF_INNER if cpu else generations.half_inner(matmul, bandwidth),
        overlap=1.0 if cpu else generations.OVERLAP,
        spread=0.0 if cpu else generations.SPREAD,
        **host,
    )


def _nvidia(
    name: str, kind: DeviceMake, sheet: str, network: str, numbers: tuple[float, ...], *,
    per_node: int = 8, matmul: str = MAMF,
) -> Device:  # fmt: skip
    return _device(
        name,
        kind,
        numbers,
        per_node,
        matmul_tflops=matmul,
        memory_gb=sheet,
        bandwidth_gb_s=sheet,
        link_gb_s=f"{sheet}, half of the bidirectional figure of NVLink",
        network_gb_s=network,
        devices_per_node=sheet,
    )


_GUESSED = "one core of a usual server, guessed; tools/calibrate.py measures yours"
_HDR = "one HDR InfiniBand port of 200 Gb/s per GPU (DGX A100)"
_NDR = "one NDR InfiniBand port of 400 Gb/s per GPU (DGX H100, B200)"
_XDR = "one ConnectX-8 port of 800 Gb/s per GPU (GB300 NVL72)"
_AMD = HOPPER.like(0.55, ASSUMED + "55 % of the matmul rate")

#                  matmul   GB   GB/s  link  network
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _nvidia("v100-32g", AMPERE.like(0.40, ASSUMED + "no fused kernel of ours"),
                "NVIDIA V100 SXM3 data sheet (fp16; it has no bf16)",
                "one EDR InfiniBand port of 100 Gb/s per two GPUs (DGX-2)",
                (102, 32, 900, 150, 6.25), matmul=ASSUMED + "82 % of peak, as A100 PCIe"),
        _nvidia("a100-40g", AMPERE, "NVIDIA A100 data sheet", _HDR, (271.2, 40, 1555, 300, 25)),
        _nvidia("a100-80g", AMPERE, "NVIDIA A100 data sheet", _HDR, (271.2, 80, 2039, 300, 25)),
        _nvidia("h100", HOPPER, "NVIDIA H100 SXM data sheet", _NDR, (794.5, 80, 3350, 450, 50)),
        _nvidia("h800", HOPPER.like(), "NVIDIA H800 SXM data sheet (NVLink 400 GB/s)", _NDR,
                (794.5, 80, 3350, 200, 50), matmul=MAMF + " of H100"),
        _nvidia("h200", HOPPER.like(), "NVIDIA H200 SXM data sheet", _NDR,
                (794.5, 141, 4800, 450, 50)),
        _nvidia("gh200", HOPPER.like(), "NVIDIA GH200 data sheet (96 GB HBM3)", _NDR,
                (828.6, 96, 4000, 450, 50), per_node=4),
        _nvidia("b200", BLACKWELL.like(), "NVIDIA HGX B200 data sheet", _NDR,
                (1745, 180, 7700, 900, 50)),
        _nvidia("gb200", BLACKWELL, "NVIDIA GB200 NVL72 data sheet", _NDR,
                (1939, 186, 8000, 900, 50), per_node=72,
                matmul=ASSUMED + "77.6 % of peak, as B200"),
        _nvidia("gb300", BLACKWELL.like(), "NVIDIA GB300 NVL72 data sheet", _XDR,
                (1939, 279, 8000, 900, 100), per_node=72,
                matmul=ASSUMED + "77.6 % of peak, as B200"),
        _device("cpu", CORES, (0.1, 16, 12, 4, 1.0), 2,
                peak_tflops=_GUESSED, matmul_tflops=_GUESSED, sustained=_GUESSED,
                attention=_GUESSED, memory_gb=_GUESSED, bandwidth_gb_s=_GUESSED,
                link_gb_s=_GUESSED, network_gb_s=_GUESSED, devices_per_node=_GUESSED),
        _device("mi300x", _AMD, (781.9, 192, 5300, 448, 50), 8, matmul_tflops=MAMF,
                memory_gb="AMD MI300X data sheet", bandwidth_gb_s="AMD MI300X data sheet",
                link_gb_s="AMD MI300X data sheet: 7 Infinity Fabric links of 64 GB/s per direction",
                network_gb_s="one port of 400 Gb/s per GPU (usual in servers of 8)",
                devices_per_node="AMD MI300X platform data sheet"),
        _device("mi325x", _AMD, (781.9, 256, 6000, 448, 50), 8, matmul_tflops=MAMF + " of MI300X",
                memory_gb="AMD MI325X data sheet", bandwidth_gb_s="AMD MI325X data sheet",
                link_gb_s="AMD MI325X data sheet: 7 Infinity Fabric links of 64 GB/s per direction",
                network_gb_s="one port of 400 Gb/s per GPU (usual in servers of 8)",
                devices_per_node="AMD MI325X platform data sheet"),
    )
}  # fmt: skip
"""Name for --hardware -> device."""

ALIASES: Mapping[str, str] = {
    "v100": "v100-32g", "a100": "a100-80g", "h100-80g": "h100", "h100-sxm": "h100",
    "h200-141g": "h200", "mi300": "mi300x",
}  # fmt: skip
"""Other names for --hardware."""


def find_device(name: str) -> Device:
    """The device of a name, this project's or its driver's, or of a YAML file (.yaml or .yml)."""
    if name.endswith((".yaml", ".yml")):
        return read_device(name)
    key = name.lower().replace("_", "-")
    key = short_name(name) or ALIASES.get(key, key)
    if key not in DEVICES:
        raise ConfigError(
            f"--hardware {name}: {_known_peak(key)}; there are {', '.join(DEVICES)}; "
            "or give a .yaml file (docs/guides/plan.md shows one)"
        )
    return DEVICES[key]


def _known_peak(key: str) -> str:
    if key not in ACCELERATORS:
        return "no such device"
    peak = ACCELERATORS[key].peak_tflops
    return f"no such device to plan for (its peak is {peak:g} TFLOP/s, its links are not known)"


_MAY_BE_0 = ("host_memory_gb", "overlap", "spread")


def read_device(path: str) -> Device:
    """A device from YAML: `base: <known device>` and the fields that differ, or all fields.

    Raises one ConfigError that names the file and every unknown, missing or impossible field.
    """
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hardware {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"--hardware {where}: not valid YAML") from None
    if not isinstance(read, dict):
        raise ConfigError(f"--hardware {path}: holds no `field: value` lines")
    values = dict(read)
    base = values.pop("base", None)
    fields = {field.name: field for field in dataclasses.fields(Device)}
    problems = [
        f"{path}: {key}: no such field; there are base, {', '.join(fields)}"
        for key in values
        if key not in fields
    ]
    for key, value in values.items():
        if key in ("cpu", "bf16") and not isinstance(value, bool):
            problems.append(f"{path}: {key}: {value!r} must be true or false")
        if key in fields and key not in ("name", "sources", "cpu", "bf16"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            low = number and (value < 0 if key in _MAY_BE_0 else value <= 0)
            if not number or low:
                problems.append(f"{path}: {key}: {value!r} must be a number above 0")
            elif key in ("sustained", "attention", "overlap") or key.endswith("_efficiency"):
                if value > 1:
                    problems.append(f"{path}: {key}: {value} is a share; at most 1")
            elif key == "devices_per_node" and value != int(value):
                problems.append(f"{path}: {key}: {value} must be a whole number")
    if base is None:
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = [n for n in required if n not in values and n not in ("name", "sources")]
        if missing:
            problems.append(f"{path}: without `base: <device>` it needs {', '.join(missing)}")
    if problems:
        raise all_together(problems, f"in {path}")
    values.setdefault("name", Path(path).stem)
    given = {key: f"given in {Path(path).name}" for key in values if key != "name"}
    if base is None:
        return Device(**{"sources": given, **values})
    start = find_device(str(base))
    told = values.pop("sources", {})
    return dataclasses.replace(start, **values, sources={**start.sources, **given, **told})


def table() -> str:
    """All devices with their numbers, and below the source of each."""
    shown = ("peak_tflops", "matmul_tflops", "sustained", "attention", "memory_gb",
             "bandwidth_gb_s", "link_gb_s", "network_gb_s", "devices_per_node")  # fmt: skip
    lines = ["".join([f"{'device':<10}", *(f"{name:>17}" for name in shown)])]
    for device in DEVICES.values():
        numbers = (f"{getattr(device, name):>17,g}" for name in shown)
        lines.append("".join([f"{device.name:<10}", *numbers]))
    for device in DEVICES.values():
        lines.append(f"\n{device.name}")
        lines += [f"  {name:<18}{device.sources[name]}" for name in shown]
    lines.append("\nof all GPUs, where a file says nothing else")
    h100 = DEVICES["h100"]
    lines += [
        f"  {name:<24}{getattr(h100, name):<10,g}{source}"
        for name, source in generations.GENERAL.items()
    ]
    return "\n".join(lines)
