"""What follows from a record: ratios, bandwidths, names. Definitions of what the reports show."""

from statistics import median, quantiles
from typing import Any

Record = dict[str, Any]  # one case and the figures of its providers
Results = dict[str, Any]  # of one device

PEERS = (
    "eager", "eager float32", "torch.compile", "torch.compile float32", "Liger-Kernel", "TRL",
    "speculators",
)  # fmt: skip
OFF = 0.01  # a gradient further off than this is said to be


def device_name(results: Results) -> str:
    return (results["gpu"] or results["processor"])["name"]


def losses(results: Results) -> list[Record]:
    """The records of a loss, forward and backward or alone; not what stands beside them."""
    return [r for r in results["cases"] if r.get("providers") and "moved_bytes" in r]


def usual(results: Results) -> list[Record]:
    """Forward and backward; of each V with the N that most have, so that one stands for it."""
    records = [r for r in losses(results) if r["backward"]]
    rows: dict[int, list[int]] = {}
    for r in records:
        rows.setdefault(r["V"], []).append(r["N"])
    return [r for r in records if r["N"] == max(rows[r["V"]], key=rows[r["V"]].count)]


def ours(record: Record) -> str:
    """The backend that "auto" takes there."""
    name = f"fastkd {record['device']}"
    return name if name in record["providers"] else "fastkd triton"


def timed(record: Record, *names: str) -> bool:
    providers = record.get("providers", {})
    return all("seconds" in providers.get(name, {}) for name in names)


def seconds(record: Record, name: str) -> float:
    return median(record["providers"][name]["seconds"])


def spread(record: Record, name: str) -> float:
    """Half the interquartile range, of the median."""
    rounds = record["providers"][name]["seconds"]
    if len(rounds) < 2:
        return 0.0
    low, middle, high = quantiles(rounds, n=4)
    return (high - low) / 2 / middle


def ratio(record: Record, slow: str, fast: str) -> float:
    """The median over the rounds: the two of one round saw the machine in the same state."""
    both = (record["providers"][name]["seconds"] for name in (slow, fast))
    return median(a / b for a, b in zip(*both, strict=True))


TENSORS = {"copy": 2, "torch.add": 3}  # of N x V, that these move


def moved(record: Record, name: str) -> int:
    """Bytes; of a loss those that any implementation has to move."""
    tensors = TENSORS.get(name)
    return tensors * record["tensor_bytes"] if tensors else record["moved_bytes"]


def bandwidth(record: Record, name: str) -> float:
    """Bytes per second."""
    return moved(record, name) / seconds(record, name)


def _of(record: Record, name: str, other: str) -> float:
    return moved(record, name) / moved(record, other) * ratio(record, other, name)


def of_copy(record: Record, name: str) -> float:
    """Relative to the device's bandwidth in a copy of the same logits, in the same rounds."""
    return _of(record, name, "copy")


def of_add(record: Record, name: str) -> float:
    return _of(record, name, "torch.add")


def gradients(record: Record, name: str) -> float:
    """The peak of what it allocates, in tensors of N x V."""
    return record["providers"][name]["peak_bytes"] / record["tensor_bytes"]


def error(record: Record, name: str) -> float | None:
    return record["providers"].get(name, {}).get("gradient_error")


def passes(record: Record) -> str:
    return "" if record["backward"] else ", forward"


def label(record: Record) -> str:
    return f"{record['option']}{passes(record)}, {record['dtype']}, V = {record['V']}"
