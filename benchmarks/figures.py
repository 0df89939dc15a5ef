"""What follows from a record: ratios, bandwidths, names. Definitions of what the reports show."""

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
    return all("median_s" in providers.get(name, {}) for name in names)


def seconds(record: Record, name: str) -> float:
    return record["providers"][name]["median_s"]


def ratio(record: Record, slow: str, fast: str) -> float:
    return seconds(record, slow) / seconds(record, fast)


def bandwidth(record: Record, name: str) -> float:
    """Bytes per second, of those that any implementation has to move."""
    factor = {"copy": 2, "torch.add": 3}.get(name)
    moved = factor * record["tensor_bytes"] if factor else record["moved_bytes"]
    return moved / seconds(record, name)


def of_copy(record: Record, name: str) -> float:
    """Of the device's own bandwidth in a copy of the same logits, in the same race."""
    return bandwidth(record, name) / bandwidth(record, "copy")


def of_add(record: Record, name: str) -> float:
    return bandwidth(record, name) / bandwidth(record, "torch.add")


def gradients(record: Record, name: str) -> float:
    """The peak of what it allocates, in tensors of N x V."""
    return record["providers"][name]["peak_bytes"] / record["tensor_bytes"]


def error(record: Record, name: str) -> float | None:
    return record["providers"].get(name, {}).get("gradient_error")


def passes(record: Record) -> str:
    return "" if record["backward"] else ", forward"


def label(record: Record) -> str:
    return f"{record['option']}{passes(record)}, {record['dtype']}, V = {record['V']}"
