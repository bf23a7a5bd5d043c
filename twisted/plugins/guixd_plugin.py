"""Makes `twistd guixd` known."""

from twisted.application.service import ServiceMaker

guixd = ServiceMaker("guixd", "guixd.service.tap", "The build daemon of GNU Guix.", "guixd")
