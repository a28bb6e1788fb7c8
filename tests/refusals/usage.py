"""Options that cannot be carried out."""

from refusals import CONVERT, Refusal

KIND = "Options"
CASES = [
    Refusal(
        KIND, "no budget", ("convert", "SOURCE", "--out", "OUT"), "exactly one of --rank, --kv-save, --cache-elements"
    ),
    Refusal(KIND, "a method that does not exist", (*CONVERT, "--method", "magic"), "unknown method 'magic'"),
]
