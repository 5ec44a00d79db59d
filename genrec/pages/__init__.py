"""What every HTML page that genrec writes is made of: style, parts, drawings."""
