"""The table of notebooks/docs/many-gpus.md: memory and time of a step on paper, nothing is measured here.

P is in bytes of bfloat16; activations are counted as one stored input a block (they are recomputed).
"""

FLOPS, HOST = 400e12, 25e9  # a device and second: bfloat16 in practice, PCIe
INSIDE, BETWEEN = 300e9, 50e9  # bytes a device and second, inside a machine of eight and between machines
MODELS = {"7B": (7e9, 32, 4096), "70B": (70e9, 80, 8192), "405B": (405e9, 126, 16384)}
EXAMPLES, TOKENS = 4, 512


def step(model: str, experts: int, devices: int) -> tuple[float, float]:
    """GB and seconds of a step on each device."""
    parameters, blocks, width = MODELS[model]
    size = 2 * parameters
    largest = size / blocks
    local = max(1.0, EXAMPLES / devices)  # a device has at least one example a task
    memory = size / devices + 3 * largest + 2 * blocks * width * TOKENS * local
    work = 6 * parameters * experts * local * TOKENS
    sent = experts * 4 * size * (devices - 1) / devices
    read = (experts + 1) * (1 + experts) * size / devices
    return memory / 1e9, max(work / FLOPS, sent / (INSIDE if devices <= 8 else BETWEEN)) + read / HOST


def table() -> str:
    """Markdown: models down, experts K and devices N across; in brackets what does not fit 80 GB."""
    columns = [(experts, devices) for devices in (1, 8, 64) for experts in (3, 8)]
    lines = ["| model | " + " | ".join(f"K={k}, N={n}" for k, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for model in MODELS:
        cells = []
        for experts, devices in columns:
            memory, seconds = step(model, experts, devices)
            cells.append(f"{memory:.0f} GB, {seconds:.1f} s" if memory < 80 else f"({memory:.0f} GB)")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
