"""Small files of start-up logs, as the tests of `kvsim validate memory` write them."""

import csv

# One start of Llama 3.1 8B on an H100; what is logged is round, so that every error shows.
ROW = {
    "id": "r1", "engine": "vllm", "version": "0.19.0", "model": "meta-llama/Llama-3.1-8B-Instruct",
    "gpu": "H100-80GB-SXM", "gpu_total_gib": "79.19", "tp": "1", "pp": "1", "util": "0.95",
    "max_model_len": "8192", "dtype": "bfloat16", "weight_quant": "None", "kv_dtype": "auto", "block_size": "16",
    "max_num_batched_tokens": "8192", "max_num_seqs": "1024", "enforce_eager": "False", "weights_gib": "15.0",
    "activation_peak_gib": "1.9", "kv_avail_gib": "58.1", "num_blocks": "29700", "kv_tokens": "475200",
    "max_concurrency": "58.0",
}  # fmt: skip


def write_records(folder, *rows):
    """`records.csv` in `folder`: `ROW` once for each of `rows`, with other cells where they say so."""
    columns = list(dict.fromkeys([*ROW, *(name for row in rows for name in row)]))
    path = folder / "records.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(ROW | row for row in rows)
    return path
