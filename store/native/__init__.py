"""The C core of the store; ``_store`` is the module that cffi builds from it (see ``build.py``)."""
