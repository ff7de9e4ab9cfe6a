"""Errors that say which field is wrong, what was found there, what is needed, and what to do about it."""

from __future__ import annotations


class KvkernError(ValueError):
    """Base of every error that kvkern raises on purpose.

    field   the argument, file field or resource that is wrong
    found   its value, never the contents of a tensor
    needed  what would have been accepted
    do      the next step of whoever reads it
    """

    def __init__(self, field: str, *, found: object, needed: object, do: str) -> None:
        self.field, self.found, self.needed, self.do = field, str(found), str(needed), do
        super().__init__(f"{field}: found {found}, needed {needed}\n  do: {do}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.field, self.found, self.needed, self.do)


def _rebuild(kind: type[KvkernError], field: str, found: str, needed: str, do: str) -> KvkernError:
    return kind(field, found=found, needed=needed, do=do)


class ShapeError(KvkernError):
    """A tensor of the wrong shape or stride."""


class DtypeError(KvkernError):
    """A tensor or model of the wrong dtype."""


class DeviceError(KvkernError):
    """A tensor or model on the wrong device, or a device that is not there."""


class CapacityError(KvkernError):
    """Too few pages, slots, positions or bytes."""


class RequestError(KvkernError):
    """A bad argument, question or document."""


class UnsupportedError(KvkernError):
    """A model, option or backend that kvkern refuses by name."""


class IdentityError(KvkernError):
    """A prefix that was made by something else than what it is about to serve."""


class StoreError(KvkernError):
    """A .kv file that is damaged, cut short, or no .kv file."""


class ReadOnlyError(KvkernError):
    """A write to a published prefix, or the use of a released one."""


class TemplateError(KvkernError):
    """A chat template under which the document is no prefix of the conversation."""


class BackendError(KvkernError):
    """An explicitly chosen backend that cannot run here."""
