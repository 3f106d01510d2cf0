"""Without SAELens: what needs it says which version was tested."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from transcoder.interop.accelerate import PeerVersionError


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="SAELens is installed here")
def test_the_training_classes_say_which_saelens_they_want() -> None:
    with pytest.raises(
        PeerVersionError, match=r"tested with sae-lens 6\.54, found none installed; install sae-lens==6\.54"
    ):
        importlib.import_module("transcoder.interop.saelens_training")
