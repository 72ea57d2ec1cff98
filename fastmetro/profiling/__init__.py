"""How fast a network runs, where its time goes, and how that compares: what `fastmetro bench` prints and saves."""
