"""Data-sheet numbers of the devices that a plan can be made for. The only such table; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from perl_megatron.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device of a node. Peaks are the maker's: without sparsity, one direction of a link."""

    key: str
    """What the command line calls it."""
    name: str
    memory: float | None
    """Bytes of the device, in all: nvidia-smi's where the source names it. Of that CUDA gives processes a little less,
    which is an assumption (``device_reserve_gib``). None: this machine's, shared out."""
    flops: float
    """Matrix products in bfloat16 with float32 sums; per second."""
    flops_float32: float
    """The same in float32 without shortened factors; per second."""
    bandwidth: float
    """Of the device's memory; bytes per second."""
    link: float
    """To the other devices of the node, one direction; bytes per second."""
    network: float
    """To other nodes, each device's share, one direction; bytes per second."""
    per_node: int
    """Devices of a node, as such nodes usually have; ``node.node_of`` says how many a run has."""
    source: str
    """Where the numbers come from."""

    @property
    def is_cpu(self) -> bool:
        """Whether it is a process on a CPU."""
        return self.key == "cpu"

    def within_node(self, span: int, processes: int) -> bool:
        """Whether groups of ``span`` neighbours among so many processes do not leave a node."""
        return processes <= self.per_node or self.per_node % span == 0


GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu(
            key="a100-80g",
            name="A100 SXM 80 GB",
            memory=80.0 * GIB,
            flops=312e12,
            flops_float32=19.5e12,
            bandwidth=2.039e12,
            link=300e9,
            network=25e9,
            per_node=8,
            source="NVIDIA A100 data sheet (2021): 80 GB HBM2e, NVLink 600 GB/s both ways; DGX A100: 200 Gb/s for each",
        ),
        Gpu(
            key="h100-80g",
            name="H100 SXM",
            memory=79.6 * GIB,
            flops=989e12,
            flops_float32=67e12,
            bandwidth=3.35e12,
            link=450e9,
            network=50e9,
            per_node=8,
            source="NVIDIA H100 data sheet: 80 GB HBM3 (81,559 MiB by nvidia-smi), NVLink 900 GB/s both ways; DGX "
            "H100: 400 Gb/s for each",
        ),
        Gpu(
            key="h200",
            name="H200 SXM",
            memory=140.4 * GIB,
            flops=989e12,
            flops_float32=67e12,
            bandwidth=4.8e12,
            link=450e9,
            network=50e9,
            per_node=8,
            source="NVIDIA H200 data sheet: 141 GB HBM3e (143,771 MiB by nvidia-smi), NVLink 900 GB/s both ways; "
            "DGX H200: 400 Gb/s for each",
        ),
        Gpu(
            key="b200",
            name="B200",
            memory=178.0 * GIB,
            flops=2250e12,
            flops_float32=75e12,
            bandwidth=8.0e12,
            link=900e9,
            network=50e9,
            per_node=8,
            source="NVIDIA DGX B200 data sheet: 1,440 GB HBM3e and 36 PFLOPS bfloat16 with sparsity for eight, NVLink "
            "1.8 TB/s both ways, 400 Gb/s for each; of its 180 GB some are taken as the driver's",
        ),
        Gpu(
            key="mi300x",
            name="MI300X",
            memory=191.0 * GIB,
            flops=1307e12,
            flops_float32=163e12,
            bandwidth=5.3e12,
            link=448e9,
            network=50e9,
            per_node=8,
            source="AMD Instinct MI300X data sheet: 192 GB HBM3, seven Infinity Fabric links of 128 GB/s both ways; "
            "400 Gb/s for each is what such nodes usually have",
        ),
        Gpu(
            key="cpu",
            name="one process on a CPU",
            memory=None,
            flops=160e9,
            flops_float32=160e9,
            bandwidth=20e9,
            link=2e9,
            network=1e9,
            per_node=8,
            source="no data sheet: two cores with AVX-512 as they were measured for this project (docs/kernels.md), in "
            "float32; links are gloo's over loopback",
        ),
    )
}


def gpu_of(key: str) -> Gpu:
    """The device of that name; UserError where there is none."""
    if key not in GPUS:
        raise UserError(f"no device is called {key!r}", where="--gpu", fix=f"one of {', '.join(GPUS)}")
    return GPUS[key]
