"""What `ssl-locat bench` measures, one file per subject; each has `rows(quick) -> list of dicts`."""
