"""From rows and prices to money."""
