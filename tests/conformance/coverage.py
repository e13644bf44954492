"""What a run of conformance has compared, in total and by setting."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

COLUMNS = ("workloads", "requests", "steps", "tokens", "preemptions", "evictions", "hit_tokens")


@dataclass
class Figures:
    seed: int
    scheduler: str
    only: str
    seconds: float = 0.0
    totals: Counter = field(default_factory=Counter)
    by_setting: dict[str, dict[str, Counter]] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)  # paths of the smallest cases
    errors: list[str] = field(default_factory=list)  # cases that the reference does not take

    def add(self, case: dict, ref: dict):
        """Count one case."""
        if "error" in ref:
            self.errors.append(f"{case['name']}: {ref['error']}")
            return
        counts = counts_of(case, ref)
        self.totals.update(counts)
        for setting, value in labels(case).items():
            self.by_setting.setdefault(setting, {}).setdefault(value, Counter()).update(counts)

    def progress(self) -> str:
        t = self.totals
        return (
            f"{self.seconds:.0f} s: {t['workloads']:,} workloads, {t['steps']:,} steps, "
            f"{t['preemptions']:,} preemptions, {t['evictions']:,} evictions; {len(self.differences)} differ"
        )

    def as_dict(self) -> dict:
        return {
            "seed": self.seed,
            "scheduler": self.scheduler,
            "only": self.only,
            "seconds": round(self.seconds),
            "differences": self.differences,
            "errors": self.errors,
            "totals": dict(self.totals),
            "by_setting": {k: {v: dict(c) for v, c in sorted(d.items())} for k, d in self.by_setting.items()},
        }

    def markdown(self) -> str:
        """The totals and the table of settings, for docs/conformance.md."""
        t = self.totals
        lines = [
            f"Seed {self.seed}, {self.seconds / 60:.0f} minutes, {self.scheduler}"
            + (f", only {self.only}" if self.only else "")
            + f": {len(self.differences)} differences.",
            "",
            "| " + " | ".join(name.replace("_", " ") for name in t) + " |",
            "|" + "---|" * len(t),
            "| " + " | ".join(f"{value:,}" for value in t.values()) + " |",
            "",
            "| setting | value | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
            "|---|---|" + "---|" * len(COLUMNS),
        ]
        for setting, values in sorted(self.by_setting.items()):
            lines += [
                f"| {setting} | {value} | " + " | ".join(f"{counts[name]:,}" for name in COLUMNS) + " |"
                for value, counts in sorted(values.items())
            ]
        return "\n".join(lines)


def counts_of(case: dict, ref: dict) -> Counter:
    """What there is to compare in one case. The reference's last row has the totals."""
    tail, steps = ref["rows"][-1], [row for row in ref["rows"] if "s" in row]
    return Counter(
        workloads=1,
        requests=len(case["requests"]),
        steps=len(steps),
        tokens=tail["tokens"],
        preemptions=tail["preemptions"],
        evictions=ref["evictions"],
        hit_tokens=tail["hit_tokens"],
        block_ids=sum(len(ids) for row in steps for groups in row.get("blk", {}).values() for ids in groups),
        rejected=tail["status"].get("rejected", 0),
        capped=tail["status"].get("capped", 0),
        stalled=tail["stalled"] is True,
        livelocks=ref["is_cut"],
        workloads_that_preempt=tail["preemptions"] > 0,
        workloads_that_evict=ref["evictions"] > 0,
        workloads_that_hit=tail["hit_tokens"] > 0,
    )


def labels(case: dict) -> dict[str, str]:
    """The value of each setting in a case, large ranges in a few classes."""
    config, unit, size = case["config"], case["hash_unit"], case["config"]["block_size"]
    out = {
        key: word(config[key])
        for key in (
            "policy", "async_scheduling", "enable_prefix_caching", "enable_chunked_prefill", "frontend",
            "scheduler_reserve_full_isl", "prefill_schedule_interval", "watermark",
        )
    }  # fmt: skip
    threshold = config["long_prefill_token_threshold"]
    adaptive = "adaptive" if config["long_prefill_token_threshold_adaptive"] else "fixed"
    groups = config["groups"]
    return out | {
        "mode": case["mode"],
        "block_size": f"{size:02}",
        "max_num_active_seqs": "none" if config["max_num_active_seqs"] is None else "set",
        "long_prefill_token_threshold": adaptive if threshold else "off",
        "groups": "+".join(group["kind"] for group in groups) if groups else "none",
        "prefix_cache_retention_interval": word(config["prefix_cache_retention_interval"]),
        "hash_unit": "block size"
        if unit in (None, size)
        else "multiple of it"
        if unit % size == 0
        else "other",
        "policy and async": f"{config['policy']}, {'async' if config['async_scheduling'] else 'sync'}",
        "requests": next(name for most, name in SIZES if len(case["requests"]) <= most),
    }


SIZES = ((6, "1-6"), (40, "7-40"), (120, "41-120"), (10**9, "more"))


def word(value) -> str:
    return (
        {True: "on", False: "off", None: "none"}[value]
        if value is None or value is True or value is False
        else str(value)
    )
