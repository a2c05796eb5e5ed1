"""The model and the options that the arguments of a command ask for."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fuse import models
from fuse.errors import InvalidOption, NoDevice, did_you_mean
from fuse.models import ModelCall, Wanted
from fuse.options import Options, resolve


def wanted(args: argparse.Namespace) -> Wanted:
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    return Wanted(args.layers, args.length, args.batch, args.padding, dtype, args.attention)


def loaded(args: argparse.Namespace, weights: bool) -> ModelCall:
    """On the device that was asked for, for training or not. Raises NoDevice, and what ``models.load`` raises."""
    check_device(args.device)
    call = models.to(models.load(args.model, wanted(args), weights=weights), args.device)
    if isinstance(call.model, torch.nn.Module):
        call.model.train(args.train)
    return call


def options(args: argparse.Namespace, **more: Any) -> Options:
    """Raises InvalidOption."""
    return resolve(None, more if args.target is None else {"target": args.target, **more})


def check_device(device: str) -> None:
    """Raises InvalidOption for what is no device, NoDevice for one that is not there."""
    try:
        torch.device(device)
    except RuntimeError as error:
        allowed = "cpu, or a GPU: cuda, cuda:1 …"
        hint = did_you_mean(device, ("cpu", "cuda"))
        raise InvalidOption(name="--device", value=device, allowed=allowed, hint=hint) from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise NoDevice(what=f"--device {device}") from error
