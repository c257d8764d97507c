"""What the kit uses of Colab's own package, for tests: same names, same errors, nothing behind them.

Put the folder `fake_colab` on the path and import `google.colab`, as Colab's kernel does before the first cell.
Names and errors as in github.com/googlecolab/colabtools.
"""

from google.colab import drive, errors, files, userdata  # noqa: F401
