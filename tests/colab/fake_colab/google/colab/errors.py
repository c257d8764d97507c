class Error(Exception):
    """Base of the errors that Colab raises."""
