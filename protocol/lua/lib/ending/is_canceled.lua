-- Whether a status says that a request was canceled, by us or by RQ, or stopped by RQ.
local function is_canceled(status)
  return status == 'canceled' or status == 'stopped'
end
