"""A device's name finds its own figures, not those of a device whose name contains it."""

import pytest
import torch

from pipelines.training.peaks import device_peak, known_peak


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla T4", 65e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("NVIDIA RTX A4000", None),  # not an A40
        ("NVIDIA A100X", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_found_by_name(name: str, wanted: float | None) -> None:
    assert known_peak(name, "bfloat16") == wanted


def test_float32_is_without_tensor_cores_and_cpus_are_not_known() -> None:
    assert known_peak("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert device_peak(torch.device("cpu"), "float32") is None
