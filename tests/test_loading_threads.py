"""Models loaded by several threads at once: transformers patches itself while it loads one."""

import threading
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

import lowbit

BOOKS = Path(__file__).parent.parent / "eval" / "data" / "books-4m"


def test_threads_that_load_at_once_all_get_their_model() -> None:
    failed: list[Exception] = []
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()

    def load() -> None:
        try:
            model, _ = lowbit.load(BOOKS)
            assert model.lm_head.weight is model.model.embed_tokens.weight
        except Exception as error:
            failed.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=load) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert torch.get_default_dtype() == torch.float32
