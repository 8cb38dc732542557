"""What a drawn program is put together from: each file holds the source text of one part."""
