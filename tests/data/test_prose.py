"""Cleaning of docstrings: what is prose stays, what is not goes."""

import time

import pytest

from hf_dynsparse.data.prose import clean_text, is_prose


DOCSTRING = """Scale the weights of a layer so that the output keeps the variance of the input.

    The factor is taken from :func:`~package.tools.factor` and from [`Scaler`], as ``Scaler`` does in *every* layer,
    see `the guide <https://example.org/guide>`_ and https://example.org/more for the reasons [1]_.

    .. note::
        The weights of the embedding are never scaled, because they are shared with the head.

    .. code-block:: python

        the code of this block is not kept, even if it reads like a sentence of English

    Args:
        weight (`torch.Tensor` of shape `(rows, columns)`, *optional*, defaults to `None`):
            The weights that are scaled in place, or none of them.
        factor (`float`): What to multiply with, if it is not the default of the layer.

    Parameters
    ----------
    bias : array_like, optional
        The values that are added to the output of the layer.

    Example::

        this is a literal block and it is not prose of any kind at all

    >>> scale(weight, 2.0)
    the output of a doctest is not to be kept in the text

    ```python
    and this is the content of a fence, which is not to be kept
    ```

    | the | table | is | not | a | sentence | of | the | text |
"""


def test_docstring_worked_example() -> None:
    assert list(clean_text(DOCSTRING)) == [
        "Scale the weights of a layer so that the output keeps the variance of the input.",
        "The factor is taken from package.tools.factor and from Scaler, as Scaler does in every layer, see the guide"
        " and for the reasons.",
        "The weights of the embedding are never scaled, because they are shared with the head.",
        "The weights that are scaled in place, or none of them.",
        "What to multiply with, if it is not the default of the layer.",
        "The values that are added to the output of the layer.",
    ]


def test_list_items_are_paragraphs_of_their_own() -> None:
    text = """Two rules:

    - The first of the rules is that a line which is too long
      goes on in the next one.
    - The second of the rules is that there is no third rule.
    """
    assert list(clean_text(text)) == [
        "The first of the rules is that a line which is too long goes on in the next one.",
        "The second of the rules is that there is no third rule.",
    ]


def test_prose_after_a_doctest_or_literal_block_is_kept() -> None:
    text = """Call it as in the example below, which is not kept::

        value = call(1) and the rest of the line is not kept either

    >>> call(1)
    1
    ... and more

    After the example there is more text that is to be kept.
    """
    assert list(clean_text(text)) == [
        "Call it as in the example below, which is not kept:",
        "After the example there is more text that is to be kept.",
    ]


def test_is_prose_refuses_code_tables_and_names() -> None:
    assert is_prose("This is a sentence of plain English words that is long enough.")
    assert not is_prose("This one is too short.")
    assert not is_prose("result = function(first, second) if the_flag else other_function(third, fourth)")
    assert not is_prose("float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 complex64 complex128")
    assert not is_prose(r"The sum is \sum_{i=1}^n of all the terms that are in the series.")
    assert not is_prose("Dieser Satz ist lang genug, aber er besteht nicht aus Worten der Sprache.")


@pytest.mark.parametrize("filler", [" ", ":a", "**a ", "<!--"])
def test_long_texts_take_time_by_their_length(filler: str) -> None:
    text = "It is said of the long text that it " + filler * 50_000 + "is not read."
    started = time.process_time()
    list(clean_text(text))
    assert time.process_time() - started < 2.0  # else more than a minute
