"""What devices can do at most, and how much of it a run uses."""

import torch

# Dense operations a second in bfloat16 (tensor cores; float16 where there is no bfloat16) and in float32 (no TF32), by
# words of the name that the driver gives; the first row that fits counts. Data sheets print figures "with sparsity",
# which are twice these. Nominal, none was measured: `report.peak_flops` has the last word.
#   B200, GB200  NVIDIA GB200 NVL72 and HGX B200, "individual Blackwell GPU specifications"
#   H100, H200   nvidia.com/en-us/data-center/h100 and /h200; GH200 has the H100's chip
#   A100, T4     nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf, t4-tensor-core-datasheet-951643.pdf (nvidia.com)
#   A10, A40, L4, L40, L40S, V100   their data sheets at nvidia.com
#   A10G         not in NVIDIA's sheets: baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference
#   MI250, MI300 amd.com/en/products/accelerators; in float32 their matrix cores compute in full precision
PEAK_FLOPS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500e12, 80e12),
    ("B200", 2250e12, 75e12),
    ("GH200", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("A40", 149.7e12, 37.4e12),
    ("A10G", 70e12, 31.5e12),
    ("A10", 125e12, 31.2e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("L4", 121e12, 30.3e12),
    ("V100 PCIE", 112e12, 14.1e12),
    ("V100", 125e12, 15.7e12),
    ("T4", 65e12, 8.1e12),
    ("MI300X", 1307.4e12, 163.4e12),
    ("MI250X", 191.5e12, 47.9e12),  # of one of its two dies, which is a device of its own
    ("MI250", 181e12, 45.3e12),  # the same
)


def known_peak(name: str, precision: str) -> float | None:
    """Operations a second of a device with this name, in float32 or bfloat16; None where it is not known."""
    words = name.replace("-", " ").split()
    for part, bfloat16, float32 in PEAK_FLOPS:
        if all(word in words for word in part.split()):
            return bfloat16 if precision == "bfloat16" else float32
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """`known_peak` of the device at hand; None for CPUs."""
    return known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
