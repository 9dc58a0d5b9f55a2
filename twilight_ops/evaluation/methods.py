"""What is compared: a selector with its settings, and p; written `name:field=value,...` on the command line."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .. import selectors
from ..config import TwilightConfig
from ..selectors import Selector
from .aggregation import ExactTopK
from .ceiling import ExactTopP

ALL_LAYERS = 1 << 20  # of any model
# Fields of TwilightConfig that a method may set beside those of its selector.
CONFIG_FIELDS = {"page_size": int, "dense_layers": int, "dense_below": int, "sink_tokens": int, "recent_tokens": int}


@dataclass(frozen=True)
class Method:
    """One row of the results: a selector (None: dense), p, and configuration fields that differ from the defaults."""

    selector: Selector | None
    top_p: float = 1.0
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        return "dense" if self.selector is None else self.selector.name

    @property
    def label(self) -> str:
        """The specification that gives this method again, without p: fields at their defaults are left out."""
        if self.selector is None:
            return "dense"
        fields = [
            (f.name, getattr(self.selector, f.name))
            for f in dataclasses.fields(self.selector)
            if getattr(self.selector, f.name) != f.default
        ]
        text = ",".join(f"{name}={_format(value)}" for name, value in [*fields, *self.settings])
        return f"{self.name}:{text}" if text else self.name

    @property
    def key(self) -> str:
        return self.label if self.selector is None else f"{self.label} p={self.top_p:g}"

    def config(self) -> TwilightConfig:
        """Every length is sparse (dense_below 0), so that short contexts show the method too."""
        if self.selector is None:
            return TwilightConfig(dense_layers=ALL_LAYERS, top_p=1.0)
        return TwilightConfig(selector=self.selector, top_p=self.top_p, **{"dense_below": 0, **dict(self.settings)})

    def check_files(self, where: str) -> None:
        """ValueError for a calibration file that is not there, before a model is loaded for it."""
        path = getattr(self.selector, "calibration", None)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{where}: {self.name}: calibration: expected a file of `python -m twilight_ops calibrate`, got {path}")

    def with_top_p(self, top_p: float) -> Method:
        return dataclasses.replace(self, top_p=top_p)

    def with_tokens(self, tokens: int) -> Method:
        """The selector alone with a fixed budget."""
        selector = dataclasses.replace(self.selector, token_budget=max(1, tokens), budget_fraction=0.0)
        return dataclasses.replace(self, selector=selector, top_p=1.0)


DENSE = Method(None)


def _format(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)


def selector_classes() -> dict[str, type[Selector]]:
    """Every selector by its name, those of the ablations among them."""
    found = [*(getattr(selectors, name) for name in selectors.__all__), ExactTopK, ExactTopP]
    return {cls.name: cls for cls in found if isinstance(cls, type) and issubclass(cls, Selector) and cls.name}


def parse_method(text: str, where: str = "methods") -> Method:
    """`quest:budget_fraction=1/4,token_budget=1` -> Method; raises ValueError with what is expected, beginning with `where`."""
    name, _, settings = text.strip().partition(":")
    classes = selector_classes()
    if name != "dense" and name not in classes:
        raise ValueError(f"{where}: expected one of dense, {', '.join(classes)}, got {name!r}")
    parts = list(filter(None, settings.split(",")))
    if name == "dense":
        if parts:
            raise ValueError(f"{where}: expected dense without fields, got {text!r}")
        return DENSE
    types = typing.get_type_hints(classes[name])
    fields = {field.name: types[field.name] for field in dataclasses.fields(classes[name])}
    chosen, config = {}, {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals or field not in {**fields, **CONFIG_FIELDS}:
            raise ValueError(f"{where}: {name}: expected field=value with a field of {', '.join([*fields, *CONFIG_FIELDS])}, got {part!r}")
        target, kind = (chosen, fields[field]) if field in fields else (config, CONFIG_FIELDS[field])
        if field in target:
            raise ValueError(f"{where}: {name}: expected {field} once, got {part!r} again")
        target[field] = _convert(kind, value)
    try:
        method = Method(classes[name](**chosen), 1.0, tuple(config.items()))
        method.config()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return method


def _convert(kind, value: str):
    """The value that the text stands for, or the text itself: the record that it is for says what it expects."""
    if value == "None":
        return None
    kinds = typing.get_args(kind) or (kind,)
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(int(part) for part in value.split("+"))
        if bool in kinds:
            return {"true": True, "false": False}.get(value.lower(), value)
        if float in kinds:
            return float(Fraction(value))
        return int(value) if int in kinds else value
    except (ValueError, ZeroDivisionError):
        return value


# Budgets as shares of the context, so that one list serves every length; token_budget=1 leaves the decision to the share.
def _share(name: str, share: str, **fields) -> str:
    text = ",".join(f"{key}={value}" for key, value in fields.items())
    return f"{name}:token_budget=1,budget_fraction={share}" + (f",{text}" if text else "")


STANDARD = (
    "full",
    "shadow_prefix",
    _share("quest", "1/4"),
    _share("page_mean", "1/4"),
    _share("double_sparsity", "1/4"),
    _share("sparq", "1/8", channels=16),
    _share("tidal", "1/8"),
    _share("streaming", "1/4"),
    "magicpig",
)
