"""What the accelerators could do at most."""

# Dense bfloat16 TFLOP/s by what the name of a GPU contains. Source: the data sheets of NVIDIA (SXM where there are two).
TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def flops(device: str) -> float | None:
    """Per second, of a device by its name; None if it is not known."""
    return next((tflops * 1e12 for name, tflops in TFLOPS.items() if name in device), None)
