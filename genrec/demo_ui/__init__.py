"""A local page that shows what a trained run recommends, and how it gets there."""
