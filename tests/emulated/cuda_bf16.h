#pragma once

#include "toolkit.h"
