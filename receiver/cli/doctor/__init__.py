"""Looks at a set-up as it stands, from the settings to the way in from outside, and says what is wrong with its cure."""
