"""What a generator makes: sample grids, files of samples, and exports of the generator itself."""
