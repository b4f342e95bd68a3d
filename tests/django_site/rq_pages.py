"""A Django site that has nothing but an admin and django-rq's pages: ``rq_pages.py PORT REDIS_PORT FOLDER``.

Prints the cookie of a superuser's session when it serves.
"""

from __future__ import annotations

import sys
from wsgiref.simple_server import make_server

import django
from django.conf import settings
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.urls import include, path

urlpatterns: list[object] = []


def main(port: int, redis_port: int, folder: str) -> None:
    settings.configure(
        SECRET_KEY="of a site that lives for one test",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["127.0.0.1"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{folder}/site.sqlite3"}},
        PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],
        INSTALLED_APPS=[
            "django.contrib.admin",
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "django.contrib.messages",
            "django_rq",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        RQ_QUEUES={"gpu": {"HOST": "127.0.0.1", "PORT": redis_port, "DB": 0}},
    )
    django.setup()
    call_command("migrate", verbosity=0)

    from django.contrib import admin
    from django.contrib.auth import get_user_model
    from django.test import Client

    urlpatterns[:] = [path("admin/", admin.site.urls), path("rq/", include("django_rq.urls"))]
    person = get_user_model().objects.create_superuser("person", "", "x")
    browser = Client()
    browser.force_login(person)
    with make_server("127.0.0.1", port, get_wsgi_application()) as server:
        print(f"sessionid={browser.cookies['sessionid'].value}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
