"""Make what decoding needs: a corpus, a tokeniser, small targets, and drafts and Medusa heads for any target.

Run it as ``python -m specgym.decoding.fit <command> --help``. The models that the package ships were made by
``decoding/fit/make_tiny.sh``, which holds nothing but these commands.
"""
