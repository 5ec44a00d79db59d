"""Where the time goes: a short, warmed, marked window of training, of generation or of one operator."""
