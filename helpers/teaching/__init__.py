"""Charts and small experiments that belong to the lessons and to nothing else, one file per topic."""
