"""Options that cannot be carried out."""

from refusals import CONVERT, Refusal

KIND = "Options"
CASES = [
    Refusal(
        KIND, "no budget", ("convert", "SOURCE", "--out", "OUT"), "exactly one of --rank, --kv-save, --cache-elements"
    ),
    Refusal(KIND, "a method that does not exist", (*CONVERT, "--method", "magic"), "'magic' is not one of", code=2),
    Refusal(
        KIND,
        "an option that is called otherwise",
        (*CONVERT, "--dataset", "c4"),
        "no such option: --dataset; did you mean --calibration?",
        code=2,
    ),
    Refusal(KIND, "an option that is misspelt", (*CONVERT, "--kv-sav", "0.5"), "did you mean --kv-save?", code=2),
    Refusal(
        KIND,
        "a command that is called otherwise",
        ("compress", "SOURCE"),
        "no such command: compress; did you mean care convert?",
        code=2,
    ),
    Refusal(
        KIND,
        "a recipe with an option that the command does not have",
        (*CONVERT, "--recipe", "WORK/recipe.yaml"),
        "has no option 'kv_svae'; did you mean kv_save?",
        lambda place: (place.directory / "recipe.yaml").write_text("kv_svae: 0.5\n"),
    ),
    Refusal(
        KIND,
        "a recipe that is no YAML",
        (*CONVERT, "--recipe", "WORK/recipe.yaml"),
        "neither YAML nor JSON",
        lambda place: (place.directory / "recipe.yaml").write_text("kv_save: [0.5\n"),
    ),
    Refusal(
        KIND,
        "a recipe with a value that the option does not take",
        ("convert", "SOURCE", "--out", "OUT", "--recipe", "WORK/recipe.yaml"),
        "--kv-save",
        lambda place: (place.directory / "recipe.yaml").write_text("kv_save: half\n"),
        code=2,
    ),
    Refusal(KIND, "a recipe that is not there", (*CONVERT, "--recipe", "WORK/none.yaml"), "No such file"),
]
