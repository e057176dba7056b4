"""The experts on a GPU: requests brought into rows on the device, and the products that run on those rows."""
