"""Networks with Gaussian noise in front, and what is proved of their accuracy in the Wasserstein ball, at any size.

Draws are counted (`counts`), counts become a curve for every radius and order (`certificate`, `means`), an attack
through the noise bounds the same network from above (`attack`); `certify` is the one call. The network itself,
`Randomised`, lives in `zoo`, so that cards can hold it. Imports `threats`, `attacks`, `accuracy`, `zoo`, records'
files, settings and digests.
"""
