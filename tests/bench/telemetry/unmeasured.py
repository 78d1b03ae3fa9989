"""A router that counts no request, to see what counting costs."""

from router.main import main
from router.request_metrics import RequestMetrics

RequestMetrics.count = lambda self, labels, ns, compute_us: False

if __name__ == "__main__":
    main()
