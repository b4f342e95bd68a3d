--- @include lib/ending/is_canceled

-- Whether somebody wants a running request to end: by our flag in its hash, or by its status, as RQ's commands do.
local function cancel_asked(flag, status)
  return flag == '1' or is_canceled(status)
end
