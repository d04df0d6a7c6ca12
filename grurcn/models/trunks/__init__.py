"""Trunks by name: importing any trunk registers the built-in ones."""

from grurcn.models.trunks import mobilenet, vgg
from grurcn.models.trunks.base import TrunkSpec, register_trunk

__all__ = ["TrunkSpec", "register_trunk"]

register_trunk("vgg16", vgg.SPEC)
register_trunk("mobilenet_v2", mobilenet.SPEC)
