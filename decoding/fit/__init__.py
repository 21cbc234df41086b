"""Make what decoding needs: text, a tokeniser, small targets; drafts, Medusa heads and what guides draft trees for any.

Run it as ``python -m specgym.decoding.fit <command> --help``. The models that the package ships were made by
``decoding/fit/make_tiny.sh``, which holds nothing but these commands.
"""
