"""The checks of the exercises, one file per lesson: they tell right from wrong and give no answer away."""
