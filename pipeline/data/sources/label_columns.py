"""Finds the column of labels in Parquet and Arrow files, and the classes that it names."""

from dataclasses import replace

import pyarrow as pa

from pipeline.data.formats import told_by_all
from pipeline.data.labels import MOST_UNNAMED_CLASSES, class_text, name_classes
from pipeline.data.sources.cells import Columns, check_plain, is_binary, is_list, is_text, texts
from pipeline.data.sources.look import Look, check_there, listed
from pipeline.errors import InputError
from pipeline.redact import printable

NO_LABELS = "none"
_USUAL = (
    "label", "labels", "class", "cls", "class_label", "target", "y", "category", "fine_label", "class_id", "label_id",
    "class_name", "label_name", "classes", "targets", "category_id",
)  # fmt: skip
_ROWS = 4096


def choose_label(looks: list[Look], image: str, wanted: str) -> str:
    """Chooses the column of labels, the same in all files that have one; "" for none.

    Args:
        image: the column of images.
        wanted: the requested column, "none", or "" to find it.

    Raises:
        InputError: the column is missing or holds no labels, or several columns may be meant.
    """
    if wanted == NO_LABELS or not looks:
        return ""
    if wanted:
        check_there("--label-column", looks, wanted)
        for look in looks:
            if wanted in look.schema.names:
                check_plain(look.name, look.schema, wanted)
                if wanted == image or not _may_label(look.type_of(wanted)):
                    holds = f"holds {look.type_of(wanted)} in {printable(look.name)}"
                    raise InputError(f"--label-column {wanted}: {holds}, not labels")
        return wanted
    found = dict.fromkeys(label for look in looks if (label := label_column(look, image)))
    if len(found) > 1:
        raise InputError(
            f"columns {listed(found)} of different files hold labels: give --label-column (none = no labels)"
        )
    return next(iter(found), "")


def label_column(look: Look, image: str) -> str:
    """The column of labels in one file: a ClassLabel of `datasets`, else a column with a usual name; "" for none.

    Raises:
        InputError: several columns may be meant, or the column has an extension type.
    """
    fields = [field for field in look.fields if field.name != image]
    classes = [f.name for f in fields if look.kind(f.name) == "ClassLabel" and _may_label(f.type)]
    plain = [name for name in classes if name.lower() == _USUAL[0]]
    if len(classes) > 1 and len(plain) != 1:
        raise InputError(f"columns {listed(classes)} hold classes: give --label-column (none = no labels)")
    if classes:
        return (plain or classes)[0]
    for usual in _USUAL:
        for field in fields:
            if field.name.lower() == usual:
                check_plain(look.name, look.schema, field.name)
                if _may_label(field.type) and not _holds_masks(look, field):
                    return str(field.name)
    return ""


def _may_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or is_list(kind):
        inner = kind.value_type
        return not is_list(inner) and _may_label(inner)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return number or is_text(kind) or is_binary(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def _holds_masks(look: Look, field: pa.Field) -> bool:
    """True if the column holds images, such as masks, rather than labels."""
    return is_binary(field.type) and any(told_by_all(data or b"") for data, _ in look.first(field.name))


def name_labels(looks: list[Look], columns: dict[str, Columns]) -> tuple[tuple[str, ...], dict[str, Columns]]:
    """The classes of all files, and the columns of each file with the names of its class numbers.

    Class numbers get the names that `datasets` noted in the same file, or else in the other files if those agree.
    Text labels are class names themselves, sorted; all of them are read for that.

    Returns:
        classes (empty if numbers have no names) and columns by file.

    Raises:
        InputError: there are too many different texts for classes.
    """
    labelled = [look for look in looks if columns[look.name].label]
    named = {look.name: look.names(columns[look.name].label) for look in labelled}
    different = dict.fromkeys(names for names in named.values() if names)
    shared = next(iter(different)) if len(different) == 1 else ()
    classes = tuple(dict.fromkeys(name for names in different for name in names))
    unnamed = [look for look in labelled if not named[look.name]]
    if any(_is_text(look.type_of(columns[look.name].label)) for look in unnamed):
        found = set[str]()
        for look in unnamed:
            found |= _labels(look, columns[look.name].label, shared)
            if len(found) > MOST_UNNAMED_CLASSES:
                raise InputError(
                    f"column {printable(columns[look.name].label)} holds more than {MOST_UNNAMED_CLASSES:,} different "
                    f"labels, such as {min(found)[:60]!r}: too many for classes: give --label-column (none = no labels)"
                )
        classes = (*classes, *(name for name in name_classes(found) if name not in set(classes)))
    kept, mine = dict[Columns, Columns](), dict[str, Columns]()
    for name, both in columns.items():
        its = replace(both, classes=named.get(name) or (shared if both.label else ()))
        mine[name] = kept.setdefault(its, its)  # one object for all equal ones, so that pickle stores it once
    return classes, mine


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) or is_list(kind) else kind
    return is_text(kind) or is_binary(kind)


def _labels(look: Look, label: str, names: tuple[str, ...]) -> set[str]:
    found = set[str]()
    for array in look.read(label, _ROWS):
        found |= {text for value in texts(array) if (text := class_text(value, names)[0]) is not None}
        if len(found) > MOST_UNNAMED_CLASSES:
            break
    return found
