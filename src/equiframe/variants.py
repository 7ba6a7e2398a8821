"""The rows of a comparison: methods, each perhaps with fields of its own, and the folders that they are kept in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from equiframe.errors import InputError, unknown
from equiframe.method import METHOD_FIELDS, METHODS, resolve_method
from equiframe.recipe import DATA_FIELDS, FIELD_NAMES, WITHOUT_EFFECT, Recipe, setting_from_text, setting_to_text

# every row trains on and is tested on the same images, on the same machine
SHARED_FIELDS = (*DATA_FIELDS, *WITHOUT_EFFECT, "device", "precision", "memory_format", "deterministic")


@dataclass(frozen=True)
class Variant:
    """A method with some fields of its own, ``etf-la:tau=0.5:lr=0.05`` as text, ``etf-la+tau=0.5+lr=0.05`` as a folder."""

    method: str
    fields: tuple[tuple[str, object], ...] = ()

    @staticmethod
    def parse(text: str) -> Variant:
        """Raises `InputError` for an unknown method or field, a value of the wrong kind, or a field that all rows share."""
        method, *settings = re.split(r":(?=[\w-]+=)", text.strip())
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        fields = [setting_from_text(setting) for setting in settings]
        for name, _ in fields:
            if name in ("method", "seed"):
                raise InputError(f"{text}: {name} cannot be set in a variant; compare has --{name}s")
            if name in SHARED_FIELDS:
                raise InputError(f"{text}: {name} is shared by all methods of a comparison; give it as --{_flag(name)}")
            if [n for n, _ in fields].count(name) > 1:
                raise InputError(f"{text}: {name} is set twice")
        return Variant(method, tuple(sorted(fields, key=lambda field: FIELD_NAMES.index(field[0]))))

    @staticmethod
    def from_folder(name: str) -> Variant | None:
        """The variant that a folder is named by; None for other folders."""
        try:
            variant = Variant.parse(":".join(unquote(part) for part in name.split("+")))
        except InputError:
            return None
        return variant if variant.folder == name else None

    @property
    def name(self) -> str:
        return ":".join((self.method, *self._settings()))

    @property
    def folder(self) -> str:
        """A name that every file system takes, and that tells the variant again."""
        return "+".join(quote(part, safe="=") for part in (self.method, *self._settings()))

    def _settings(self) -> list[str]:
        return [setting_to_text(name, value) for name, value in self.fields]

    def recipe(self, recipe: Recipe, **changes: object) -> Recipe:
        """The comparison's recipe as this row trains it. Fields that its head and loss lack are an `InputError`."""
        recipe = recipe.with_(method=self.method, **(dict(self.fields) | changes))
        resolve_method(self.method, {name: getattr(recipe, name) for name in METHOD_FIELDS})
        return recipe


def _flag(name: str) -> str:
    return name.replace("_", "-")


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """`Variant.parse` of each; one that is listed twice is an `InputError`."""
    variants = [Variant.parse(text) for text in texts]
    for variant in variants:
        if variants.count(variant) > 1:
            raise InputError(f"method {variant.name} is listed twice")
    return variants
