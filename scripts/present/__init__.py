"""What commands and the page share: options, reading, printing, timelines, metrics."""
