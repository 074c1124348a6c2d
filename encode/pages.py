"""What the pages that are written as files have in common: they load nothing, and run nothing."""

POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
"""For the head of each: whatever text of a log got into a page as markup, a browser would leave it alone."""
