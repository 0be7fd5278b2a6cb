"""`flora-receiver doctor`: checks a set-up from its settings to its public URL; every finding has a fix."""
