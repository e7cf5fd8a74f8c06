"""What there is to compare: attentions and their settings, variants, probes, studies."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llama_jax.ablate.probes import PROBES
from llama_jax.config import configs_folder, read_yaml
from llama_jax.model.attention import ATTENTION


def print_list(console: Console) -> int:
    """Prints them all; returns 0."""
    attentions = {
        name: [_summary(attention.__doc__), *_settings(attention.Settings)]
        for name, attention in ATTENTION.items()
    }
    _print(console, "model.attention", attentions)
    variants = read_yaml(configs_folder() / "variants.yaml")["variants"]
    named = {name: [str(changes)] for name, changes in variants.items()}
    _print(console, "variants (configs/variants.yaml)", named)
    probes = {name: [probe.description] for name, probe in PROBES.items()}
    _print(console, "probes", probes)
    studies = {
        path.stem: [str(read_yaml(path).get("title", ""))]
        for path in sorted((configs_folder() / "ablations").glob("*.yaml"))
    }
    _print(console, "studies (ablate --config NAME)", studies)
    return 0


def _print(console: Console, title: str, lines: dict[str, list[str]]) -> None:
    table = Table("name", "", box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name, texts in lines.items():
        table.add_row(escape(name), escape("\n".join(texts)))
    console.print(table)


def _summary(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0]


def _settings(schema: type) -> list[str]:
    """attention_settings of a variant, a line each."""
    return [
        f"  {name}: {' '.join((field.description or '').split())}"
        for name, field in schema.model_fields.items()  # type: ignore[attr-defined]
    ]
